"""Tiny transformers models, based on their default configurations, and batches for them."""

import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

#: The largest model that is built, in parameters.
LARGEST = 120_000_000

VOCABULARY, TOKENS, SAMPLES, CLASSES = 99, 12, 3, 3

#: Small values for numbers of a configuration, by name pattern; the first match wins.
SMALL: tuple[tuple[str, int], ...] = (
    (
        r"(^|_)(vocab_size|vocab_size_per_layer_input|text_vocab_size|entity_vocab_size)$",
        VOCABULARY,
    ),
    (r"^(type_vocab_size|num_labels|num_channels|in_channels|patch_size|in_chans)$", 0),
    (r"_token_id$|_token_index$|_id$", 0),
    (r"^(num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num)$", 2),
    (r"(num_|n_).*head|^(heads|encoder_attention_heads|decoder_attention_heads)$|_heads$", 2),
    (
        r"head_dim|head_size|^d_kv$|^d_head$|^attention_head_dim|qk_rope|qk_nope|v_head|rotary_dim",
        16,
    ),
    (r"num_experts_per_tok|moe_topk|moe_k|top_k|num_selected_experts", 2),
    (r"n_group|topk_group", 1),
    (r"num_.*experts|n_routed_experts|moe_num_experts", 4),
    (r"q_lora_rank|kv_lora_rank|lora", 8),
    (r"(num_|n_).*layer|^(encoder_layers|decoder_layers|layers|depth|num_blocks)$|_layers$", 2),
    (r"^image_size$|^input_size$", 32),
    (r"max_position|n_positions|n_ctx|max_source|max_target|max_seq|seq_length", 64),
    (r"num_mel|n_mels|feature_size|num_feat", 0),
    (r"intermediate|ffn|inner|d_ff|mlp_dim|ff_dim|hidden_dim$", 32),
    (r"hidden_size|d_model|n_embd|embed_dim|embedding_size|^dim$|_dim$|width|proj|units", 32),
    (r"state_size|dt_rank|n_state", 8),
    (r"window", 8),
)


_TOKEN = re.compile(r"_token_id$|_token_index$")

#: What to shrink: everything; if the model then fails, only the layers; nothing.
LEVELS = (SMALL, tuple(row for row in SMALL if "layer" in row[0]), ())


def shrink(config: PretrainedConfig, small_ones: Sequence[tuple[str, int]]) -> None:
    """Shrink a configuration and nested ones, in place."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            shrink(value, small_ones)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1:
            for pattern, small in small_ones:
                if re.search(pattern, name):
                    if small and value > small:
                        setattr(config, name, small)
                    break
            if small_ones is SMALL and _TOKEN.search(name) and value >= VOCABULARY:
                setattr(config, name, VOCABULARY - 1)
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int):
        for name in ("layer_types", "mlp_layer_types", "block_types"):
            kinds = getattr(config, name, None)
            if isinstance(kinds, list) and len(kinds) != layers:
                setattr(config, name, kinds[:layers])


#: Values that some configurations leave open, but models need.
OPEN = {
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "vocab_size": VOCABULARY,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
}


def complete(config: PretrainedConfig) -> None:
    """Set values that a configuration leaves open, in place."""
    always = ("pad_token_id", "decoder_start_token_id")
    for name, value in OPEN.items():
        try:
            if getattr(config, name, None if name in always else value) is None:
                setattr(config, name, value)
        except Exception:
            pass
    if hasattr(config, "languages"):
        config.default_language = config.languages[0]
    if hasattr(config, "ctc_zero_infinity"):
        config.ctc_zero_infinity = True
    ropes = getattr(config, "rope_parameters", None)
    if isinstance(ropes, dict) and (
        "mrope_section" in ropes or re.search("vl|4v|glm_image", config.model_type)
    ):
        ropes["mrope_section"] = [2, 3, 3]  # half of a small head's 16
    config.use_cache = False


def build(model_class: type[nn.Module], small_ones: Sequence[tuple[str, int]] = SMALL) -> Any:
    """Return a tiny model of a class, in evaluation mode.

    Raises:
        ValueError: it cannot be shrunk.
        Exception: any exception from the model's code.
    """
    config = model_class.config_class()
    shrink(config, small_ones)
    text = config.get_text_config()
    for each in {id(config): config, id(text): text}.values():
        complete(each)
    if "Classification" in model_class.__name__:
        config.num_labels = CLASSES
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters, however its configuration is shrunk here")
    torch.manual_seed(0)
    return model_class(config).eval()


def batch_for(model: Any) -> dict[str, Any]:
    """Return a batch for a model, based on the arguments of its `forward`."""
    names = inspect.signature(type(model).forward).parameters
    kind, config = type(model).__name__, model.config
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int = TOKENS) -> Tensor:
        top = min(VOCABULARY, getattr(config.get_text_config(), "vocab_size", VOCABULARY) or 99)
        return torch.randint(3, top - 2, (SAMPLES, length), generator=generator)

    batch: dict[str, Any] = {}
    main = model.main_input_name
    if "input_ids" in names and main != "pixel_values":
        batch["input_ids"] = tokens()
        end = getattr(config.get_text_config(), "eos_token_id", None)
        if isinstance(end, int):
            batch["input_ids"][:, -1] = end
        if "attention_mask" in names:
            mask = torch.ones(SAMPLES, TOKENS, dtype=torch.long)
            # Every sample has padding, because models handle batches without padding differently.
            for i in range(SAMPLES):
                mask[i, -1 - i :] = 0
            batch["attention_mask"] = mask
    elif main in ("pixel_values", "pixel_values_videos"):
        vision = getattr(config, "vision_config", None) or getattr(config, "encoder", config)
        size = getattr(vision, "image_size", None) or 32
        size = size if isinstance(size, int) else size[0]
        channels = getattr(vision, "num_channels", 3)
        frames = (
            [getattr(config, "num_frames", 8)] if "Video" in kind or main != "pixel_values" else []
        )
        shape = (SAMPLES, *frames, channels, size, size)
        batch[main] = torch.randn(shape, generator=generator)
        if "input_ids" in names:
            batch["input_ids"] = tokens()
    elif main == "input_features":
        audio = getattr(config, "audio_config", None) or getattr(config, "encoder_config", config)
        mels = next(
            (
                getattr(audio, n)
                for n in (
                    "num_mel_bins",
                    "input_feat_per_channel",
                    "feature_projection_input_dim",
                    "input_dim",
                )
                if hasattr(audio, n)
            ),
            80,
        )
        frames = 2 * (getattr(audio, "max_source_positions", 32))
        shape = (
            (SAMPLES, mels, frames)
            if "hisper" in kind or "Qwen2Audio" in kind
            else (SAMPLES, 64, mels)
        )
        batch[main] = torch.randn(shape, generator=generator)
    elif main == "input_values":
        shape = (
            (SAMPLES, getattr(config, "max_length", 1024), getattr(config, "num_mel_bins", 16))
            if "AST" in kind
            else (SAMPLES, 2000)
        )
        batch[main] = torch.randn(shape, generator=generator)
    else:
        raise ValueError(f"main_input_name = {main!r}")
    if "bbox" in names:
        batch["bbox"] = torch.zeros(SAMPLES, TOKENS, 4, dtype=torch.long)
    if (
        "decoder_input_ids" in names
        and ("Classification" in kind or "Question" in kind)
        and main != "input_ids"
    ):
        batch["decoder_input_ids"] = tokens()
    if "QuestionAnswering" in kind and "start_positions" in names:
        batch["start_positions"] = torch.tensor([1, 4, TOKENS + 5])
        batch["end_positions"] = torch.tensor([3, 6, 2])
    elif "MultipleChoice" in kind:
        batch = {k: torch.stack([v, v.flip(0)], 1) for k, v in batch.items()}
        batch["labels"] = torch.arange(SAMPLES) % 2
    elif "NextSentence" in kind:
        batch["labels"] = torch.arange(SAMPLES) % 2
    elif "TokenClassification" in kind:
        labels = torch.randint(CLASSES, (SAMPLES, TOKENS), generator=generator)
        labels[1, -3:] = -100
        batch["labels"] = labels
    elif "Classification" in kind:
        batch["labels"] = torch.arange(SAMPLES) % CLASSES
    elif "labels" in names:
        length = TOKENS if "input_ids" in batch else 6
        labels = batch["input_ids"].clone() if "input_ids" in batch else tokens(length)
        labels[1, -4:] = -100
        labels[2, :2] = -100
        batch["labels"] = labels
    if "labels" not in names and "start_positions" not in batch:
        raise ValueError("its forward takes no labels")
    return batch
