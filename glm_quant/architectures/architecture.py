"""An architecture: what mlx-lm makes of a checkpoint, from its config and headers alone.

mlx-lm's own `load_model` runs on weight files without weights, with expressions in place of arrays,
so names, shapes, dtypes and the strict check are its own. No weight is read and no code of the
source is run.
"""

import difflib
import importlib
import importlib.metadata
import inspect
import pkgutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from glm_quant.architectures.bounds import require_bounded
from glm_quant.architectures.expressions import Expression, constant, record, source_tensor, sources
from glm_quant.architectures.groups import Place, component_group
from glm_quant.architectures.header_files import write_header_files
from glm_quant.architectures.tracing import tracing
from glm_quant.checkpoint.header import TensorInfo, shorten
from glm_quant.errors import CheckpointError
from glm_quant.recipe import ComponentGroup

# What safetensors calls the dtypes that parameters have.
STORED_DTYPE = {
    mx.bfloat16: "BF16",
    mx.float16: "F16",
    mx.float32: "F32",
    mx.int32: "I32",
    mx.int64: "I64",
    mx.uint8: "U8",
    mx.uint32: "U32",
}
# The dtypes that `mlx_lm.convert` casts to where the config names one.
_CAST_DTYPES = ("float16", "bfloat16", "float32")

Classes = tuple[type[nn.Module], Any]


@dataclass(frozen=True)
class Parameter:
    """A parameter of the MLX model, before it gets a scheme.

    Attributes:
        name: its name, such as `model.layers.3.mlp.switch_mlp.gate_proj.weight`.
        expression: how it is computed from the source, in the dtype that `mlx_lm.convert` gives it.
        group: its component group.
        layer: the number of its layer, None outside the layers.
        module_class: name of its module's class.
        quantizable: whether its module has a quantized form and this is its weight.
    """

    name: str
    expression: Expression
    group: ComponentGroup
    layer: int | None
    module_class: str
    quantizable: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.expression.shape

    @property
    def dtype(self) -> str:
        """Its dtype, as safetensors spells it."""
        return STORED_DTYPE[self.expression.dtype]

    @property
    def path(self) -> str:
        """The path of its module."""
        return self.name.rpartition(".")[0]

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.expression.size


@dataclass(frozen=True)
class Architecture:
    """What mlx-lm makes of a checkpoint.

    Attributes:
        model_type: as the config says.
        module: name of the module whose classes make it, such as `mlx_lm.models.qwen3_moe`.
        model: the model; its parameters are lazy and have no values.
        config: the config as mlx-lm's loader leaves it.
        parameters: in the model's order.
        dropped: names of source tensors that no parameter is made of.
    """

    model_type: str
    module: str
    model: nn.Module
    config: dict[str, Any]
    parameters: tuple[Parameter, ...]
    dropped: tuple[str, ...]

    def convert_scheme(self, path: str, width: int, group_size: int) -> bool | dict[str, Any]:
        """Return whether `mlx_lm.convert` quantizes a module, or how, where its class says that.

        Args:
            path: of a module that has a quantized form.
            width: the last axis of its weight.
            group_size: what would be used where the class asks for nothing else.
        """
        predicate = getattr(self.model, "quant_predicate", None)
        if width % group_size:
            return False
        return True if predicate is None else predicate(path, self._modules[path])

    @property
    def packed(self) -> dict[str, dict[str, Any]]:
        """How each module is quantized whose weights are packed in the source already."""
        return {
            path: {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
            for path, module in self._modules.items()
            if "scales" in module and hasattr(module, "bits")
        }

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules())

    @property
    def layers(self) -> int:
        """How many layers the model has; 0 where it does not tell them."""
        return len(getattr(self.model, "layers", None) or ())


def open_architecture(
    config: Mapping[str, Any],
    tensors: Iterable[TensorInfo],
    model_classes: Callable[[Mapping[str, Any]], Classes] | None = None,
    *,
    cast: bool = True,
) -> Architecture:
    """Ask mlx-lm what it makes of a checkpoint.

    Args:
        config: the checkpoint's config.
        tensors: name, dtype and shape of its tensors.
        model_classes: returns model class and arguments class of a config; default: mlx-lm's.
        cast: whether parameters get the dtype that the config names, as in `mlx_lm.convert`.

    Raises:
        CheckpointError: mlx-lm knows no such model, or its class refuses config or tensors.
    """
    from mlx_lm.utils import load_model

    infos = list(tensors)
    model_class, arguments_class = (model_classes or mlx_lm_classes)(config)
    require_bounded(config, _argument_names(arguments_class))
    module = model_class.__module__
    expressions: dict[str, Expression] = {}
    traced_class = _traced(model_class, expressions)

    def traced_classes(config: dict[str, Any]) -> Classes:  # noqa: ARG001 - mlx-lm's signature
        return traced_class, arguments_class

    with tempfile.TemporaryDirectory(prefix="glm-quant-headers-") as name, tracing():
        folder = Path(name)
        write_header_files(folder, _without_code(config), infos)
        try:
            model, loaded_config = load_model(
                folder,
                lazy=True,
                get_model_classes=traced_classes,
            )
        except CheckpointError as error:
            raise CheckpointError(f"{module}: {error}") from None
        except Exception as error:
            raise CheckpointError(
                f"config.json: {module} of mlx-lm {mlx_lm_version()} does not take this "
                f"checkpoint: {_one_line(error)}"
            ) from None
        if cast:
            _cast_as_convert(model, loaded_config, expressions)
    parameters = _parameters(model, expressions)
    used = set[str]().union(*(sources(parameter.expression) for parameter in parameters))
    return Architecture(
        model_type=str(config["model_type"]),
        module=module,
        model=model,
        config=loaded_config,
        parameters=parameters,
        dropped=tuple(sorted(info.name for info in infos if info.name not in used)),
    )


def mlx_lm_classes(config: Mapping[str, Any]) -> Classes:
    """Return mlx-lm's model class and arguments class for a config.

    Raises:
        CheckpointError: mlx-lm has no model of this type.
    """
    from mlx_lm.utils import load_model

    # The function is private in mlx-lm; as the default of a public argument it can be had by name.
    classes = inspect.signature(load_model).parameters["get_model_classes"].default
    model_type = config.get("model_type")
    # The name reaches an import: `lfm2-vl` and two more have a hyphen, nothing else is let through.
    if not isinstance(model_type, str) or not model_type.replace("-", "_").isidentifier():
        raise _unknown(model_type)
    try:
        return classes(dict(config))
    except ValueError:
        raise _unknown(model_type) from None
    except SystemExit:  # `olmo` ends the process where a package that it needs is missing
        raise CheckpointError(
            f"config.json: mlx-lm's model {shorten(model_type)} needs a package that is not "
            "installed here."
        ) from None


def known_model_types() -> list[str]:
    """Return the names of mlx-lm's model modules."""
    models: ModuleType = importlib.import_module("mlx_lm.models")
    return sorted(module.name for module in pkgutil.iter_modules(models.__path__))


def mlx_lm_version() -> str:
    """Return the version of the installed mlx-lm."""
    return importlib.metadata.version("mlx-lm")


def _unknown(model_type: Any) -> CheckpointError:
    near = difflib.get_close_matches(str(model_type), known_model_types(), n=3, cutoff=0.5)
    nearest = f" The nearest that it has: {', '.join(near)}." if near else ""
    return CheckpointError(
        f"config.json: model_type is {shorten(model_type)}, which mlx-lm {mlx_lm_version()} does "
        f"not know.{nearest} A newer mlx-lm may have it: upgrade with `uv lock --upgrade-package "
        "mlx-lm`."
    )


def _argument_names(arguments_class: Any) -> list[str]:
    if is_dataclass(arguments_class):
        return [field.name for field in fields(arguments_class)]
    return []


def _without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config without the file of code that it may name: it is never run."""
    return {key: value for key, value in config.items() if key != "model_file"}


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text[:300]}"


def _traced(model_class: type[nn.Module], expressions: dict[str, Expression]) -> type[nn.Module]:
    """Return a subclass that arranges expressions and notes what each parameter becomes."""

    class Traced(model_class):
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, Any]:
            wrapped: dict[str, Any] = {
                name: source_tensor(name, array.shape, array.dtype)
                for name, array in weights.items()
            }
            sanitize = getattr(super(), "sanitize", None)
            return sanitize(wrapped) if sanitize else wrapped

        def load_weights(self, file_or_weights: Any, strict: bool = True) -> nn.Module:
            for name, value in file_or_weights:
                expressions[name] = value if isinstance(value, Expression) else constant(value)
            placeholders = [(name, value.placeholder) for name, value in expressions.items()]
            return super().load_weights(placeholders, strict=strict)

    Traced.__name__ = model_class.__name__
    Traced.__module__ = model_class.__module__
    return Traced


def _cast_as_convert(
    model: nn.Module, config: Mapping[str, Any], expressions: dict[str, Expression]
) -> None:
    """Cast to the dtype that the config names, as `mlx_lm.convert` does before it quantizes."""
    name = config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    if name not in _CAST_DTYPES:
        return
    dtype = getattr(mx, str(name))
    casts: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _name: True)
    changed: list[tuple[str, mx.array]] = []
    for path, value in tree_flatten(model.parameters()):
        if value.dtype != dtype and mx.issubdtype(value.dtype, mx.floating) and casts(path):
            expressions[path] = record("astype", mx.array.astype, (expressions[path], dtype), {})
            changed.append((path, expressions[path].placeholder))
    if changed:
        model.update(tree_unflatten(changed))


def _parameters(model: nn.Module, expressions: Mapping[str, Expression]) -> tuple[Parameter, ...]:
    modules = dict(model.named_modules())
    layers = _layer_paths(model, modules)
    experts = {
        module.weight.shape[0]
        for module in modules.values()
        if "Switch" in type(module).__name__ and "weight" in module
    }
    parameters: list[Parameter] = []
    for name, value in tree_flatten(model.parameters()):
        path, _, own_name = name.rpartition(".")
        layer = _layer_of(path, layers)
        prefix = layers[layer] if layer is not None else ""
        place = Place(
            path=path.removeprefix(prefix).removeprefix("."),
            classes=tuple(_classes_along(path, prefix, modules)),
            in_layer=layer is not None,
            shape=tuple(value.shape),
            parameter=own_name,
            experts=experts,
        )
        module = modules.get(path)
        parameters.append(
            Parameter(
                name=name,
                expression=expressions[name],
                group=component_group(place),
                layer=layer,
                module_class=type(module).__name__ if module is not None else "",
                quantizable=own_name == "weight"
                and value.ndim > 1
                and hasattr(module, "to_quantized"),
            )
        )
    return tuple(parameters)


def _layer_paths(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the module path of each layer; empty for a model that does not tell its layers."""
    names = {id(module): path for path, module in modules.items()}
    layers = getattr(model, "layers", None) or []
    return [names.get(id(layer), "") for layer in layers]


def _layer_of(path: str, layers: list[str]) -> int | None:
    for number, prefix in enumerate(layers):
        if prefix and (path == prefix or path.startswith(f"{prefix}.")):
            return number
    return None


def _classes_along(path: str, prefix: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the class names of a module and those that hold it, inmost first, below its layer."""
    names: list[str] = []
    while path and path != prefix:
        if path in modules:
            names.append(type(modules[path]).__name__)
        path = path.rpartition(".")[0]
    return names
