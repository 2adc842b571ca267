"""Per-sample losses of every model that transformers can build here, against its own loss.

`python tests/models/sweep.py --out FILE` writes a line of JSON per model, and goes on where it
was stopped; `--only WORD` takes the models with that in their name. `--table PAGE` writes
what FILE holds as a page of the docs.
"""

import argparse
import json
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.utils.generic import find_labels

sys.path.insert(0, str(Path(__file__).parent))

from tiny import LEVELS, SAMPLES, batch_for, build

from esam_torch.integrations.model_losses import labels_of, losses_by_row
from esam_torch.integrations.row_losses import RowLosses

KINDS = {
    "causal language models": "CAUSAL_LM",
    "masked language models": "MASKED_LM",
    "sequence to sequence": "SEQ_TO_SEQ_CAUSAL_LM",
    "image, text to text": "IMAGE_TEXT_TO_TEXT",
    "several inputs to text": "MULTIMODAL_LM",
    "speech to text": "SPEECH_SEQ_2_SEQ",
    "sequence classification": "SEQUENCE_CLASSIFICATION",
    "token classification": "TOKEN_CLASSIFICATION",
    "question answering": "QUESTION_ANSWERING",
    "multiple choice": "MULTIPLE_CHOICE",
    "next sentence": "NEXT_SENTENCE_PREDICTION",
    "image classification": "IMAGE_CLASSIFICATION",
    "video classification": "VIDEO_CLASSIFICATION",
    "audio classification": "AUDIO_CLASSIFICATION",
    "CTC": "CTC",
}


def classes() -> dict[str, str]:
    """Return the kind of each class, by its name."""
    found: dict[str, str] = {}
    for kind, name in KINDS.items():
        for names in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES").values():
            for each in (names,) if isinstance(names, str) else names:
                found.setdefault(each, kind)
    for name in dir(transformers):
        if name.endswith("ForConditionalGeneration"):
            found.setdefault(name, "other conditional generation")
    return found


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def loss_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Return the model's own loss of a batch, with the same random numbers at each call."""
    torch.manual_seed(0)
    loss = model(**batch)["loss"]
    if loss is None:
        raise ValueError("its forward returns no loss")
    return loss


def prepared(name: str) -> tuple[Any, dict[str, Any], torch.Tensor, torch.Tensor]:
    """Return (model, batch, its own loss, its own loss of each sample alone)."""
    reasons = []
    for small_ones in LEVELS:
        try:
            model = build(getattr(transformers, name), small_ones)
            batch = batch_for(model)
            own = loss_of(model, batch)
            rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(SAMPLES)]
            alone = torch.stack([loss_of(model, row).reshape(()) for row in rows])
            if own.dim() != 0 or not torch.isfinite(own):
                raise ValueError(f"its own loss is {own}")
            return model, batch, own, alone
        except TimeoutError:
            raise
        except Exception as error:
            reasons.append(short(error))
    raise ValueError(reasons[0])


def examined(name: str) -> tuple[str, str]:
    """Return (right, refused, wrong or not tried; why)."""
    try:
        model, batch, own, alone = prepared(name)
    except ValueError as error:
        return "not tried", str(error)
    try:
        rows = RowLosses(labels_of(batch, find_labels(type(model))), checking=True)
        each = losses_by_row(lambda _: loss_of(model, batch), rows, model)
    except ValueError as error:
        return "refused", short(error)
    tolerance = 2e-4 * own.abs().item() + 1e-5
    if (each - alone).abs().max() > tolerance:
        return "wrong", f"{each.tolist()}, alone {alone.tolist()}"
    return "right", ""


def too_long(*_: Any) -> None:
    raise TimeoutError("60 s")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--only", default="")
    parser.add_argument("--out", default="/dev/stdout")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(50)
    signal.signal(signal.SIGALRM, too_long)
    done = set()
    if Path(options.out).is_file():
        done = {json.loads(line)["model"] for line in Path(options.out).read_text().splitlines()}
    names = [n for n in sorted(classes()) if options.only in n][part - 1 :: parts]
    with open(options.out, "a") as out:
        for name in names:
            if name in done:
                continue
            signal.alarm(60)
            try:
                status, why = examined(name)
            except TimeoutError as error:
                status, why = "not tried", str(error)
            finally:
                signal.alarm(0)
            row = {"model": name, "kind": classes()[name], "status": status, "why": why}
            print(json.dumps(row), file=out, flush=True)


if __name__ == "__main__":
    main()
