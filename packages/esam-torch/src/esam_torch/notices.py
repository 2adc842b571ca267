"""Warnings raised within a step, kept until the user's next call."""

__all__ = ["Notices", "rounding_warning"]


class Notices:
    """Warnings, at most one of each kind."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._waiting: list[str] = []

    def __contains__(self, kind: str) -> bool:
        return kind in self._seen

    def add(self, kind: str, text: str | None) -> None:
        """Keep the first text of each kind; None marks the kind as done without a warning."""
        if kind not in self._seen:
            self._seen.add(kind)
            if text is not None:
                self._waiting.append(text)

    def take(self) -> list[str]:
        """Return and remove the texts added since the last call."""
        waiting, self._waiting = self._waiting, []
        return waiting


def rounding_warning(share: float) -> str | None:
    """Return a warning about the share of a perturbation that was rounded away; None if it is 0."""
    if share == 0.0:
        return None
    return (
        f"{share:.1%} of the entries of the first perturbation were rounded away: they are too "
        "small for weights in half precision. Keep the weights in float32 and use torch.autocast, "
        "or use a larger rho."
    )
