"""What each operation keeps for the backward pass, written down as a run would keep it.

A ``Tape`` is given the operations of a layer in their order and notes the tensors that autograd
holds on to: each storage once, and no parameters. Sizes only; nothing is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_pl.planning.memory.training_setting import ITEM_SIZES, TrainingSetting
from qlora_pl.planning.shapes.parameters import ParameterShape

FLOAT = 4
INDEX = 8


@dataclass(frozen=True)
class Value:
    """A tensor: a storage of its own, or a view of another's."""

    storage: int
    """Number of its storage."""
    size: int
    """Values of the storage."""
    item: int
    """Bytes of a value."""
    has_grad: bool = True
    """Whether the backward pass goes through it."""


class Tape:
    """The tensors kept so far.

    Args:
        setting: The run.
        ranks: Rank of the adapters of each adapted module, by its name with ``*`` for the layer.
    """

    def __init__(self, setting: TrainingSetting, ranks: dict[str, int]) -> None:
        self.setting = setting
        self.ranks = ranks
        self.item = ITEM_SIZES[setting.compute_dtype]
        """Bytes of a value of the products."""
        self.stream = ITEM_SIZES[setting.rest_dtype]
        """Bytes of a value of the sums between layers, which have the embedding's type."""
        self.kept: dict[int, int] = {}
        """Bytes by storage."""
        self.until_attention = 0
        """Bytes that were kept when attention was done."""
        self._elsewhere: set[int] = set()
        self._num_storages = 0

    @property
    def total(self) -> int:
        """Bytes of everything that is kept."""
        return sum(self.kept.values())

    def new(self, size: int, item: int | None = None, has_grad: bool = True) -> Value:
        """A tensor with a storage of its own."""
        self._num_storages += 1
        return Value(self._num_storages, size, self.item if item is None else item, has_grad)

    def like(self, *values: Value) -> Value:
        """The result of an operation, of the size and type of the first of its inputs."""
        first = values[0]
        return self.new(first.size, first.item, any(value.has_grad for value in values))

    def keep(self, *values: Value) -> None:
        """Note that the backward pass needs these."""
        for value in values:
            if value.storage not in self._elsewhere:
                self.kept[value.storage] = value.size * value.item

    def counted_elsewhere(self, value: Value) -> Value:
        """Leave a storage out, which several layers share."""
        self._elsewhere.add(value.storage)
        return value

    def end_attention(self) -> None:
        """Note how much is kept before the layer goes on to its MLP."""
        self.until_attention = self.total

    def cast(self, x: Value) -> Value:
        """The input of a product: a copy in the products' type, where autocast has to make one."""
        return x if x.item == self.item else self.new(x.size, self.item, x.has_grad)

    # -- operations ------------------------------------------------------------------------------

    def in_float(self, x: Value) -> Value:
        """The same in float32: a copy, unless it is."""
        return x if x.item == FLOAT else self.new(x.size, FLOAT, x.has_grad)

    def multiply(self, a: Value, b: Value) -> Value:
        """Each factor is kept for the gradient of the other."""
        if a.has_grad:
            self.keep(b)
        if b.has_grad:
            self.keep(a)
        wider = max(a.item, b.item)
        return self.new(a.size, wider, a.has_grad or b.has_grad)

    def dropout(self, x: Value, rate: float) -> Value:
        """A mask of bytes on a GPU; on a CPU, factors of the input's type."""
        if not rate:
            return x
        if x.has_grad:
            on_cpu = self.setting.device == "cpu"
            self.keep(self.new(x.size, x.item if on_cpu else 1))
        return self.like(x)

    def rms_norm(self, x: Value, width: int, adds_one: bool = False) -> Value:
        """LLaMA's: squares and products in float32, over a float32 copy of the input.

        Args:
            x: The input.
            width: Of a row.
            adds_one: Gemma's, which multiplies in float32 by 1 + weight.
        """
        exact = self.in_float(x)
        if x.has_grad:
            self.keep(exact, self.new(x.size // width, FLOAT))  # 1 / root mean square
            if adds_one:
                self.keep(self.new(width, FLOAT))
        if not self.setting.has_adapters:
            self.keep(self.new(x.size, FLOAT if adds_one else x.item))
        return self.new(x.size, x.item, x.has_grad or not self.setting.has_adapters)

    def t5_norm(self, x: Value, width: int) -> Value:
        """T5's: only the squares are in float32, and the sum itself is a factor."""
        if x.has_grad:
            self.keep(x, self.in_float(x), self.new(x.size // width, FLOAT))
        if not self.setting.has_adapters:
            self.keep(self.new(x.size, x.item))
        return self.new(x.size, x.item, x.has_grad or not self.setting.has_adapters)

    def layer_norm(self, x: Value, width: int) -> Value:
        """Its input, and mean and deviation of each row."""
        has_grad = x.has_grad or not self.setting.has_adapters
        if has_grad:
            self.keep(x, self.new(x.size // width, FLOAT), self.new(x.size // width, FLOAT))
        return self.new(x.size, x.item, has_grad)

    def activation(self, kind: str, x: Value) -> Value:
        """The function within an MLP."""
        if not x.has_grad:
            return self.like(x)
        if kind == "gelu_new":  # 0.5 x (1 + tanh(...)), operation by operation
            self.keep(x, *(self.like(x) for _ in range(3)))  # tanh, 1 + tanh, 0.5 x
            return self.like(x)
        out = self.like(x)
        self.keep(out if kind == "relu" else x)
        return out

    def linear(self, matrix: ParameterShape, x: Value) -> Value:
        """A product with a matrix, frozen or trained, and with its adapters.

        A frozen matrix needs nothing of its input, whether it is packed or not; but LLM.int8 keeps
        it all the same.

        Args:
            matrix: Its sizes and its name.
            x: ``(tokens, inputs)``.
        """
        setting, tokens = self.setting, x.size // matrix.inputs
        out = tokens * matrix.outputs
        if not setting.has_adapters:
            given = self.cast(x)
            self.keep(given)
            if x.has_grad and setting.uses_autocast:
                self.keep(self.new(matrix.size))  # the matrix in the products' type
            return self.new(out)
        # packed layers answer in their input's type, others in that of the products
        item = x.item if setting.is_quantized else self.item
        if setting.quant_type == "int8" and x.has_grad:
            self.keep(x)
        rank = self.ranks.get(matrix.module)
        if rank is None:
            return self.new(out, item, x.has_grad)
        dropped = self._adapters(matrix, x, rank, tokens)
        if setting.method == "dora":
            self._dora(matrix, dropped, tokens)
        return self.new(out, item)

    def _adapters(self, matrix: ParameterShape, x: Value, rank: int, tokens: int) -> Value:
        is_cast = self.setting.adapter_dtype != self.setting.compute_dtype
        dropped = self.dropout(x, self.setting.dropout)
        self.keep(self.cast(dropped))  # for the gradient of A
        self.keep(self.new(tokens * rank))  # for that of B
        if is_cast:
            if x.has_grad:
                self.keep(self.new(rank * matrix.inputs))  # a copy of A in the products' type
            self.keep(self.new(matrix.outputs * rank))
        return dropped

    def _dora(self, matrix: ParameterShape, dropped: Value, tokens: int) -> None:
        """Lengths of rows, the base's output and the adapters', each a factor of another."""
        out = tokens * matrix.outputs
        own = ITEM_SIZES[self.setting.adapter_dtype]
        self.keep(*(self.new(matrix.outputs, own) for _ in range(3)))  # |W + BA|, s - 1, s
        self.keep(self.new(out), self.new(out))
        if self.setting.dropout and self.setting.is_quantized and dropped.has_grad:
            self.keep(self.new(matrix.size))  # multiplied by once more, as plain numbers
