"""Warnings that come up within a step, kept for the next call that the user makes."""

__all__ = ["Notices", "compiled", "rounded"]


class Notices:
    """Warnings, each of a kind once."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._waiting: list[str] = []

    def __contains__(self, kind: str) -> bool:
        return kind in self._seen

    def add(self, kind: str, text: str | None) -> None:
        """Keep a text, if there has been none of its kind; None marks the kind as settled."""
        if kind not in self._seen:
            self._seen.add(kind)
            if text is not None:
                self._waiting.append(text)

    def take(self) -> list[str]:
        """Return the texts that have come up since they were asked for."""
        waiting, self._waiting = self._waiting, []
        return waiting


def rounded(share: float) -> str | None:
    """Return what to say of the share of a perturbation that rounded away, None if it is 0."""
    if share == 0.0:
        return None
    return (
        f"{share:.1%} of the entries of the first perturbation rounded away: weights in half "
        "precision cannot move by so little. Keep the weights in float32 and use torch.autocast, "
        "or take a larger rho."
    )


def compiled(few_masks: bool) -> str:
    """Return why the ascent of a compiled model computes every gradient, and what to do."""
    why, way_out = (
        ("torch before 2.13 does not compile it anew for other weights", "Use torch 2.13")
        if few_masks
        else (
            "the sampler has more masks than a compiler should compile it for",
            "Use a sampler with few masks, such as Suffix or RECOMMENDED's,",
        )
    )
    return (
        f"The model or `losses` is compiled, and {why}, so the ascent computes every gradient and "
        f"masks them after. {way_out} to save the rest."
    )
