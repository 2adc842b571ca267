"""The study: the best accuracy for a given amount of compute, by docs/study-protocol.md."""
