"""Losses per sample of all models that transformers can build, compared with their own loss.

`python tests/models/sweep.py --out FILE` writes a line of JSON per model, and resumes if it was
interrupted; `--only WORD` selects the models with this word in their name. `--table PAGE` writes
the results in FILE as a page of the docs.
"""

import argparse
import json
import signal
import sys
import warnings
from collections import Counter
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


OTHERS = "other conditional generation"

STATUSES = ("right", "refused", "wrong", "not tried")

PAGE = """# Losses per sample of transformers' models

<!--- Written by tests/models/sweep.py. -->

The results of `ESAMTrainer` and `per_sample_losses` for {number} models of
transformers {transformers},
with torch {torch}, on a CPU: all models in its mappings for these tasks, and every other
`...ForConditionalGeneration`. Each is built from a tiny configuration, with random weights, and
gets three samples of different lengths.

- *right*: each sample's loss equals the model's own loss for a batch of only that sample, to 2e-4,
  and the mean, with samples weighted by their tokens, equals its loss for the whole batch; each
  sample's loss includes a router's loss for the whole batch;
- *refused*: an error says that the loss cannot be computed per sample, and what to override;
- *wrong*: anything else;
- *not tried*: the model cannot be built or run here from a shrunken configuration and a simple
  batch, or returns no loss.

`nox -s models` writes this page again, in half an hour.

| task | right | refused | wrong | not tried |
|---|---|---|---|---|
{table}
| all | {total} |

## Refused

{refused}

## Wrong

{wrong}

## Right

{lists}

## Not tried

{not_tried}
"""


def classes() -> dict[str, str]:
    """Return the kind of each class, by its name."""
    found: dict[str, str] = {}
    for kind, name in KINDS.items():
        for names in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES").values():
            for each in (names,) if isinstance(names, str) else names:
                found.setdefault(each, kind)
    for name in dir(transformers):
        if name.endswith("ForConditionalGeneration"):
            found.setdefault(name, OTHERS)
    return found


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def loss_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Return the model's own loss for a batch, with the same random numbers in each call."""
    torch.manual_seed(0)
    loss = model(**batch)["loss"]
    if loss is None:
        raise ValueError("its forward returns no loss")
    return loss


def prepared(name: str) -> tuple[Any, dict[str, Any], torch.Tensor, torch.Tensor]:
    """Return (model, batch, its own loss, its own loss for each sample alone)."""
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


def per_sample(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (one loss per sample, the loss of the batch that their mean was compared with)."""
    found = []

    def mean_loss(_: Any) -> torch.Tensor:
        found.append(loss_of(model, batch))
        return found[-1]

    rows = RowLosses(labels_of(batch, find_labels(type(model))), checking=True)
    return losses_by_row(mean_loss, rows, model), found[-1][-1]


def router_loss(model: Any, batch: dict[str, Any], own: torch.Tensor) -> torch.Tensor | None:
    """Let a model add its router's loss for the whole batch, and return it, or None."""
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", None) is not False:
        return None
    model.config.output_router_logits = config.output_router_logits = True
    try:
        return loss_of(model, batch) - own
    except Exception:  # for example, this tiny model has no layer with experts
        return None


def examined(name: str) -> tuple[str, str]:
    """Return (right, refused, wrong or not tried; why)."""
    try:
        model, batch, own, alone = prepared(name)
    except ValueError as error:
        return "not tried", str(error)
    tolerance = 2e-4 * own.abs().item() + 1e-5
    try:
        each, mean = per_sample(model, batch)
        if abs(mean - own) > tolerance:
            return "wrong", f"compared with {mean}, its own loss is {own}"
        if (each - alone).abs().max() > tolerance:
            return "wrong", f"{each.tolist()}, alone {alone.tolist()}"
        auxiliary = router_loss(model, batch, own)
        if auxiliary is not None:
            each, _ = per_sample(model, batch)
            if (each - alone - auxiliary).abs().max() > tolerance:
                return "wrong", f"{each.tolist()}, alone {alone.tolist()}, router {auxiliary}"
    except ValueError as error:
        return "refused", short(error)
    return "right", ""


def page(rows: list[dict[str, str]]) -> str:
    """Return the docs page with the results."""
    found = Counter((row["kind"], row["status"]) for row in rows)
    total = Counter(row["status"] for row in rows)
    kinds = [kind for kind in dict.fromkeys([*KINDS, OTHERS]) if any(k == kind for k, _ in found)]
    table = [
        f"| {kind} | " + " | ".join(str(found[kind, status]) for status in STATUSES) + " |"
        for kind in kinds
    ]
    lists = [
        f"**{kind.capitalize()}**: "
        + ", ".join(r["model"] for r in rows if (r["kind"], r["status"]) == (kind, "right"))
        for kind in kinds
    ]
    reasons = {
        status: "\n".join(
            f"- {row['model']}: `{row['why'][:160].replace('`', chr(39))}`"
            for row in rows
            if row["status"] == status
        )
        for status in STATUSES[1:]
    }
    version = transformers.__version__, torch.__version__
    return PAGE.format(
        transformers=version[0],
        torch=version[1],
        number=len(rows),
        total=" | ".join(str(total[status]) for status in STATUSES),
        table="\n".join(table),
        lists="\n\n".join(lists),
        **{status.replace(" ", "_"): text or "None." for status, text in reasons.items()},
    )


def too_long(*_: Any) -> None:
    raise TimeoutError("60 s")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(50)
    signal.signal(signal.SIGALRM, too_long)
    rows = []
    if options.out.exists():
        rows = [json.loads(line) for line in options.out.read_text("utf-8").splitlines()]
    done = {row["model"] for row in rows}
    kinds = classes()
    with options.out.open("a", encoding="utf-8") as out:
        for name in sorted(kinds):
            if name in done or options.only not in name:
                continue
            signal.alarm(60)
            try:
                status, why = examined(name)
            except TimeoutError as error:
                status, why = "not tried", str(error)
            finally:
                signal.alarm(0)
            rows.append({"model": name, "kind": kinds[name], "status": status, "why": why})
            print(json.dumps(rows[-1]), file=out, flush=True)
    print(dict(Counter(row["status"] for row in rows)))
    if options.table is not None:
        options.table.write_text(page(sorted(rows, key=lambda row: row["model"])), "utf-8")
    sys.exit(any(row["status"] == "wrong" for row in rows))


if __name__ == "__main__":
    main()
