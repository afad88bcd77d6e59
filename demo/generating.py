"""What the trained model writes, and how much it resembles text that nobody trained on."""

from __future__ import annotations

from dataclasses import dataclass, field

import maskwire
from demo.fourgram import FourGram
from maskwire.data.file_data import ByteData

SAMPLES, SHOWN = 16, 3
GAP = 24  # bytes
MASK_ID, MASKED = 256, "░"


@dataclass
class Writing:
    """Samples before and after training, scored by a 4-gram model of held-out text."""

    training: ByteData
    held_out: ByteData
    length: int
    model: FourGram = field(init=False)
    real: float = 0.0
    """Bits per byte of real text that the 4-gram model did not see."""
    before: float = 0.0
    after: float = 0.0
    texts: list[str] = field(default_factory=list)
    frames: list[str] = field(default_factory=list)
    """One sample before the first unmasking pass and after each; MASKED where a byte is still masked."""
    filled: tuple[str, str, str, str] = ("", "", "", "")
    """Before the gap, what was there, what was filled in, after the gap."""

    def __post_init__(self) -> None:
        self.model = FourGram(path.read_bytes() for path in self.held_out.files)
        self.real = self.model.bits_per_byte(bytes(row) for row in self.training.spread(4 * SAMPLES))

    def untrained(self, client: maskwire.Client) -> None:
        """Score samples before training."""
        self.before = self.model.bits_per_byte(self._samples(client))

    def trained(self, client: maskwire.Client) -> None:
        """Score samples after training, and let the model fill in a gap in a row of held-out text."""
        samples = self._samples(client)
        self.after = self.model.bits_per_byte(samples)
        self.texts = [_text(sample) for sample in samples[:SHOWN]]
        self.frames = [MASKED * self.length]
        for state in client.generate_steps(count=1, length=self.length):
            self.frames.append(
                "".join(MASKED if byte == MASK_ID else _text(bytes([byte])) for byte in state.tokens[0])
            )
        row = bytes(self.held_out.spread(SAMPLES)[SAMPLES // 2])
        start = (len(row) - GAP) // 2
        end = start + GAP
        ids = [*row[:start], *[MASK_ID] * GAP, *row[end:]]
        found = bytes(map(int, client.generate([ids], temperature=0.7).tokens[0]))
        if found[:start] != row[:start] or found[end:] != row[end:]:
            raise AssertionError("the infilling changed what was given")
        self.filled = (_text(row[:start]), _text(row[start:end]), _text(found[start:end]), _text(row[end:]))

    def _samples(self, client: maskwire.Client) -> list[bytes]:
        # Random order, one byte per pass, temperature 1: this samples exactly the evaluated model.
        found = client.generate(count=SAMPLES, length=self.length)
        return [bytes(map(int, row)) for row in found.tokens]

    @property
    def fewer(self) -> float:
        """The share of bits that training saved."""
        return 1 - self.after / self.before


def _text(data: bytes) -> str:
    text = data.decode(errors="replace")
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text)
