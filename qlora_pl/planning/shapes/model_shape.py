"""``ModelShape``: every parameter of a model by kind, and what its arithmetic needs to know of it.

Made from the fields of a config.json for the known families, without a library and at once, or from
a model without weights (``build_skeleton``) for any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.base.names import matches
from qlora_pl.planning.shapes.families import FAMILIES, SIZES, Family
from qlora_pl.planning.shapes.layouts import is_gated
from qlora_pl.planning.shapes.parameters import ParameterShape, Role

POSITIVE = (*SIZES, "num_key_value_heads", "head_dim")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model's sizes."""

    model_type: str
    """transformers' name of the family."""
    parameters: tuple[ParameterShape, ...]
    num_layers: int
    """Of the decoder where there are two halves."""
    num_encoder_layers: int = 0
    """0: it has a decoder alone."""
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    mlp_size: int
    """Width within the MLP."""
    is_gated: bool
    """Whether the MLP multiplies two products, one of them through the activation."""
    activation: str
    vocabulary_size: int
    """Rows of the embedding."""
    ties_head: bool
    """Whether the head is the embedding."""
    max_positions: int | None
    """Longest row that the model was made for; None: its config.json does not say."""
    is_known: bool = True
    """Whether the family is one whose layers are known here operation by operation."""
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """What the config.json says, under the names of ``families`` and with its defaults."""

    @property
    def num_weights(self) -> int:
        """All of them, a tied head once."""
        return sum(parameter.size * parameter.count for parameter in self.parameters)

    @property
    def linears(self) -> tuple[ParameterShape, ...]:
        """The matrices that can be quantised and adapted."""
        return tuple(p for p in self.parameters if p.role == "linear")

    @property
    def queries_size(self) -> int:
        """Width of all heads' queries together."""
        return self.num_heads * self.head_size

    @property
    def keys_size(self) -> int:
        """Width of all keys, or all values, together."""
        return self.num_kv_heads * self.head_size

    @property
    def is_t5(self) -> bool:
        """Whether it is of T5's family, with an encoder and a decoder."""
        return self.model_type in ("t5", "mt5")

    def with_roles(self, *roles: Role) -> tuple[ParameterShape, ...]:
        """The parameters of some roles."""
        return tuple(p for p in self.parameters if p.role in roles)


def shape_from_config(fields: Mapping[str, Any]) -> ModelShape:
    """The sizes of a model of a known family, from its config.json alone.

    Args:
        fields: The file's contents.

    Raises:
        ConfigurationError: naming a field that is missing or impossible, or a family that is not
            known here.
    """
    if isinstance(fields.get("text_config"), Mapping):
        fields = {**fields["text_config"]}
    kind = fields.get("model_type")
    if kind is None:
        raise ConfigurationError("config.json: has no 'model_type', which names the family.")
    if kind not in FAMILIES:
        raise ConfigurationError(
            f"config.json: model_type '{kind}' is not among those whose sizes are known without "
            f"loading transformers ({', '.join(FAMILIES)})."
        )
    complete = completed(fields, FAMILIES[kind])
    return _shape(complete, tuple(FAMILIES[kind].parameters(complete)))


def is_known_family(fields: Mapping[str, Any]) -> bool:
    """Whether ``shape_from_config`` can make anything of a config.json."""
    inner = fields.get("text_config")
    return (inner if isinstance(inner, Mapping) else fields).get("model_type") in FAMILIES


def _shape(fields: Mapping[str, Any], parameters: tuple[ParameterShape, ...]) -> ModelShape:
    has_encoder = bool(fields.get("is_encoder_decoder"))
    layers = fields["num_hidden_layers"]
    return ModelShape(
        model_type=fields["model_type"],
        parameters=parameters,
        num_layers=fields["num_decoder_layers"] if has_encoder else layers,
        num_encoder_layers=layers if has_encoder else 0,
        hidden_size=fields["hidden_size"],
        num_heads=fields["num_attention_heads"],
        num_kv_heads=fields["num_key_value_heads"],
        head_size=fields["head_dim"],
        mlp_size=fields["intermediate_size"],
        is_gated=is_gated(fields),
        activation=_activation(fields),
        vocabulary_size=fields["vocab_size"],
        ties_head=bool(fields["tie_word_embeddings"]),
        max_positions=fields["max_position_embeddings"],
        fields=fields,
    )


def _activation(fields: Mapping[str, Any]) -> str:
    if "feed_forward_proj" in fields:
        kind = str(fields["feed_forward_proj"])
        return "gelu_new" if kind == "gated-gelu" else kind.rpartition("-")[2]
    return str(fields.get("hidden_act") or fields.get("activation") or "gelu")


# -- the fields of a config.json -------------------------------------------------------------------


def completed(fields: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Fields under one name each, defaults filled in, sizes checked.

    Raises:
        ConfigurationError: naming the first field that is missing or impossible.
    """
    complete = dict(fields)
    for name, others in family.other_names.items():
        found = [fields[key] for key in (name, *others) if fields.get(key) is not None]
        if found:
            complete[name] = found[-1]
    for name in SIZES:
        if complete.get(name) is None and name not in family.defaults:
            raise ConfigurationError(
                f"config.json: has no '{_named(name, family)}', without which the sizes of a "
                f"{fields['model_type']} model are not known."
            )
    has_head_size = complete.get("head_dim") is not None
    for name, default in family.defaults.items():
        if complete.get(name) is None:
            complete[name] = _derived(default, complete)
    if fields["model_type"] == "falcon":
        complete["num_key_value_heads"] = _falcon_kv_heads(complete)
    for name in POSITIVE:
        value = complete[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(
                f"config.json: '{_named(name, family)}' must be a whole number above 0, "
                f"got {value!r}."
            )
    if complete["num_attention_heads"] % complete["num_key_value_heads"]:
        raise ConfigurationError(
            f"config.json: {complete['num_attention_heads']} attention heads cannot share "
            f"{complete['num_key_value_heads']} key and value heads evenly."
        )
    is_derived = not has_head_size and " / " in str(family.defaults.get("head_dim"))
    if is_derived and complete["hidden_size"] % complete["num_attention_heads"]:
        raise ConfigurationError(
            f"config.json: '{_named('hidden_size', family)}' {complete['hidden_size']} cannot be "
            f"cut into {complete['num_attention_heads']} heads evenly."
        )
    return complete


def _named(name: str, family: Family) -> str:
    return family.other_names.get(name, (name,))[0]


def _derived(default: Any, fields: Mapping[str, Any]) -> Any:
    """A default, which may be another field, a multiple of one or a part of one."""
    if not isinstance(default, str):
        return default
    if " x " in default:
        factor, name = default.split(" x ")
        return int(factor) * fields[name]
    if " / " in default:
        whole, parts = (fields[name] for name in default.split(" / "))
        is_whole = isinstance(whole, int) and isinstance(parts, int) and parts > 0
        return whole // parts if is_whole else 1  # what is impossible is refused by its own name
    return fields.get(default, default)


def _falcon_kv_heads(fields: Mapping[str, Any]) -> int:
    if fields["new_decoder_architecture"]:
        return int(fields["num_kv_heads"])
    return 1 if fields["multi_query"] else int(fields["num_attention_heads"])


# -- a model without weights -----------------------------------------------------------------------


def shape_of_skeleton(skeleton: Any) -> ModelShape:
    """The sizes of any model, from one without weights.

    Args:
        skeleton: From ``build_skeleton``.
    """
    config = skeleton.config.get_text_config()
    fields = config.to_dict()
    parameters = _parameters_of(skeleton)
    family = FAMILIES.get(fields.get("model_type"))
    if family is not None:
        if fields.get("is_encoder_decoder"):  # transformers ties every T5 until it has its weights
            fields["tie_word_embeddings"] = getattr(config, "scale_decoder_outputs", True)
        shape = _shape(completed(fields, family), parameters)
        own = {p.name: p for p in family.parameters(dict(shape.fields))}
        heads = [own[name] for name in own if name not in {p.name for p in parameters}]
        own_head = tuple(p for p in heads if p.role == "head")
        return replace(shape, parameters=(*parameters, *own_head))
    return _unknown_shape(skeleton, config, fields, parameters)


def _unknown_shape(
    skeleton: Any, config: Any, fields: dict[str, Any], parameters: tuple[ParameterShape, ...]
) -> ModelShape:
    heads = int(getattr(config, "num_attention_heads", 0) or 1)
    rows, width = skeleton.get_input_embeddings().weight.shape
    in_layers = [p for p in parameters if p.role == "linear" and p.layers]
    mlp = max((max(p.inputs, p.outputs) for p in in_layers), default=width)
    head = skeleton.get_output_embeddings()
    return ModelShape(
        model_type=str(fields.get("model_type")),
        parameters=parameters,
        num_layers=max((p.count for p in in_layers), default=1),
        hidden_size=int(getattr(config, "hidden_size", width)),
        num_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_size=int(getattr(config, "head_dim", None) or max(1, width // heads)),
        mlp_size=int(getattr(config, "intermediate_size", None) or mlp),
        is_gated=any("gate" in p.kind for p in in_layers),
        activation=str(fields.get("hidden_act") or "gelu"),
        vocabulary_size=int(rows),
        ties_head=head is None or head.weight is skeleton.get_input_embeddings().weight,
        max_positions=fields.get("max_position_embeddings"),
        is_known=False,
        fields=fields,
    )


def _parameters_of(skeleton: Any) -> tuple[ParameterShape, ...]:
    """Parameters by kind: those of one name and shape in all layers are one."""
    from qlora_pl.modeling.base.quantization_plan import fragile_modules
    from qlora_pl.modeling.base.structure import is_conv1d, is_linear, matrices

    roles = {name: role for name, _, role in matrices(skeleton)}
    fragile = fragile_modules(skeleton)
    layers: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    kinds: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    for name, parameter in skeleton.named_parameters():
        owner_name, _, leaf = name.rpartition(".")
        owner = skeleton.get_submodule(owner_name)
        pattern, layer = _pattern(name)
        key = (pattern, tuple(parameter.shape))
        if layer is not None:
            layers.setdefault(key, []).append(layer)
        default = "bias" if leaf == "bias" and is_linear(owner) else "norm"
        kinds[key] = {
            "role": roles.get(name, default),
            "is_transposed": roles.get(name) == "linear" and is_conv1d(owner),
            "is_fragile": roles.get(name) == "linear" and matches(owner_name, fragile),
        }
    return tuple(
        ParameterShape(name=pattern, shape=shape, layers=tuple(layers.get(key, ())), **kind)
        for key, kind in kinds.items()
        for pattern, shape in [key]
    )


def _pattern(name: str) -> tuple[str, int | None]:
    """``model.layers.3.mlp.up_proj.weight`` -> the same with ``*``, and 3."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join([*parts[:place], "*", *parts[place + 1 :]]), int(part)
    return name, None
