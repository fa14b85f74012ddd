"""How many floating-point operations the training of a low-rank adapter needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of an encoder or decoder of equal layers with plain attention, and low-rank pairs on the queries and values.

    width: of the model; inner: of the feed-forward layers; gates: 3 matrices in these where they are gated, else 2;
    heads, keys: total width of queries and of keys; rank: of the adapters; words: the output layer's size, 0 where it
    is negligible.
    """

    layers: int
    width: int
    inner: int
    gates: int
    heads: int
    keys: int
    rank: int
    words: int

    @classmethod
    def of(cls, config: Any, rank: int, is_dialogue: bool) -> "Sizes":
        """From a transformers configuration of BERT's or Llama's kind."""
        count = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // count
        keys = (getattr(config, "num_key_value_heads", None) or count) * size
        gates = 3 if config.model_type == "llama" else 2
        words = config.vocab_size if is_dialogue else 0
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            gates,
            count * size,
            keys,
            rank,
            words,
        )

    def step(self, lengths: Sequence[int], predicted: int) -> int:
        """Operations, a product and a sum counted as two, of training on rows of these lengths.

        predicted: positions that the output layer is needed for. Forward and back to the inputs of every matrix, none
        for gradients of frozen ones; the first layer's queries, keys and values have no inputs to go back to, and its
        keys, in front of which nothing is trained, no gradient at all. Norms, softmax and the like are not counted.
        """
        tokens, pairs = sum(lengths), sum(n * n for n in lengths)
        into = self.width * (self.heads + 2 * self.keys)
        rest = self.heads * self.width + self.gates * self.width * self.inner
        matrices = 4 * tokens * (self.layers * (into + rest)) - 2 * tokens * into
        attention = 12 * self.layers * pairs * self.heads - 2 * pairs * self.heads
        one = self.rank * self.width, self.rank * (self.heads + self.keys)  # both a; both b
        adapters = 6 * tokens * self.layers * (2 * one[0] + one[1]) - 2 * tokens * 2 * one[0]
        return matrices + attention + adapters + 4 * predicted * self.width * self.words
