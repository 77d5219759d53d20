"""Things that went wrong without stopping the training: counted always, logged once per kind and layer."""

import logging
from collections import Counter

logger = logging.getLogger(__name__)


class EventLog:
    """Counts of events, under ``kind:layer``."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def report(self, kind: str, layer_name: str, consequence: str) -> None:
        """Count an event, and log the first one of its kind in its layer as a warning.

        Args:
            kind: What happened, an identifier such as ``failed_inverse``.
            layer_name: Where.
            consequence: What follows from it, for the message.
        """
        key = f"{kind}:{layer_name}"
        self.counts[key] += 1
        if self.counts[key] == 1:
            logger.warning("%s: %s; %s.", layer_name, kind.replace("_", " "), consequence)
