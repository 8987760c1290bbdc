"""The spec of a process class: its inputs, its outputs, and for a work chain its outline.

There is one spec for a class, filled in two ways that may be mixed: by ``define(cls, spec)`` and by nested
dataclasses ``Inputs`` and ``Outputs``. It is built once, when it is first asked for, and never changes after that.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable, Mapping
from types import NoneType
from typing import TYPE_CHECKING, Any

from prunus.errors import InvalidInputError, SpecError
from prunus.processes.ports import (
    MISSING,
    InputPort,
    OutputPort,
    Port,
    PortNamespace,
    Problems,
    Validator,
    choices_of,
    types_of,
)

if TYPE_CHECKING:
    from prunus.processes.process import Process


class ProcessSpec:
    """What a process class takes and gives."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs = PortNamespace("inputs")
        self.outputs = PortNamespace("outputs")
        self.input_class: type[Any] | None = None
        """The class's `Inputs`, if that dataclass alone makes up the inputs."""
        self.output_class: type[Any] | None = None
        """The class's `Outputs`."""

    def input(
        self,
        name: str,
        *,
        valid_type: Any = Any,
        required: bool | None = None,
        default: Any = MISSING,
        validator: Validator | None = None,
        help: str | None = None,
    ) -> None:
        """Define an input; a dotted `name` puts it into a namespace.

        `valid_type` is a class, a tuple of classes or an annotation; `default` a value or a function without
        arguments that makes one. Without a default the input is required unless `required` is false.
        """
        self.inputs.add(name, _port(InputPort, name, valid_type, required, default, validator, help))

    def output(
        self,
        name: str,
        *,
        valid_type: Any = Any,
        required: bool | None = None,
        default: Any = MISSING,
        validator: Validator | None = None,
        help: str | None = None,
    ) -> None:
        """Define an output; a process that finishes without a required one has excepted."""
        self.outputs.add(name, _port(OutputPort, name, valid_type, required, default, validator, help))

    def input_namespace(
        self,
        name: str,
        *,
        dynamic: bool = False,
        valid_type: Any = Any,
        required: bool = True,
        validator: Validator | None = None,
        help: str | None = None,
    ) -> None:
        """Define a namespace of inputs; a `dynamic` one takes any names, with values of `valid_type`."""
        types = types_of(valid_type, name)
        self.inputs.add(name, PortNamespace(name.rpartition(".")[2], required, dynamic, types, validator, help))

    def output_namespace(
        self,
        name: str,
        *,
        dynamic: bool = False,
        valid_type: Any = Any,
        required: bool = True,
        validator: Validator | None = None,
        help: str | None = None,
    ) -> None:
        """Define a namespace of outputs."""
        types = types_of(valid_type, name)
        self.outputs.add(name, PortNamespace(name.rpartition(".")[2], required, dynamic, types, validator, help))

    def expose_inputs(
        self,
        process_class: type[Process],
        namespace: str | None = None,
        *,
        include: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
    ) -> None:
        """Take over the inputs of another class, into `namespace` if given.

        `include` and `exclude` are dotted paths of whole segments: ``a`` is the port or namespace ``a``, and never
        ``ab``.
        """
        _expose(self.inputs, process_class.spec().inputs, namespace, include, exclude)

    def expose_outputs(
        self,
        process_class: type[Process],
        namespace: str | None = None,
        *,
        include: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
    ) -> None:
        """Take over the outputs of another class; see `expose_inputs`."""
        _expose(self.outputs, process_class.spec().outputs, namespace, include, exclude)

    def outline(self, *instructions: Any) -> None:
        """Only a `WorkChain` has an outline."""
        raise SpecError(f"{self.name} is no WorkChain, so it has no outline")

    def complete(self, process_class: type[Process]) -> None:
        """Compile what is defined; changes are refused from now on."""
        self.inputs.freeze()
        self.outputs.freeze()

    # --- using it -----------------------------------------------------------------------------------

    def read_inputs(self, inputs: Any) -> dict[str, Any]:
        """The inputs as a plain dictionary, complete and checked; `InvalidInputError` with every problem."""
        if inputs is None:
            inputs = {}
        elif dataclasses.is_dataclass(inputs) and not isinstance(inputs, type):
            inputs = fields_of(inputs)
        problems: Problems = {}
        filled: dict[str, Any] = self.inputs.fill(inputs, "inputs", problems)
        if problems:
            raise InvalidInputError(self.name, problems)
        return filled

    def show_inputs(self, values: Mapping[str, Any]) -> Any:
        """What `process.inputs` is: an instance of the class's `Inputs`, or a frozen namespace."""
        if self.input_class is not None:
            return self.input_class(**values)
        return self.inputs.freeze_values(values, f"the inputs of {self.name}")

    def read_output(self, name: str, value: Any) -> Any:
        """Check one output by its dotted name; `InvalidInputError`."""
        problems: Problems = {}
        value = self.outputs.accept(name.split("."), value, "outputs", problems)
        if problems:
            raise InvalidInputError(self.name, problems)
        return value

    def read_outputs(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """All outputs, complete with defaults; `InvalidInputError` if required ones are missing."""
        problems: Problems = {}
        filled: dict[str, Any] = self.outputs.fill(outputs, "outputs", problems)
        if problems:
            raise InvalidInputError(self.name, problems)
        return filled

    def describe(self) -> dict[str, Any]:
        """The spec as plain data, for people and tools."""
        return {"name": self.name, "inputs": self.inputs.describe(), "outputs": self.outputs.describe()}


def build(process_class: type[Process]) -> ProcessSpec:
    """The complete, frozen spec of a class. Raises `SpecError`."""
    spec = process_class.spec_class(process_class.__qualname__)
    inputs, outputs = getattr(process_class, "Inputs", None), getattr(process_class, "Outputs", None)
    if inputs is not None:
        _add_fields(spec.inputs, inputs, InputPort, process_class)
    if outputs is not None:
        _add_fields(spec.outputs, outputs, OutputPort, process_class)
    process_class.define(spec)
    if inputs is not None and set(spec.inputs.ports) == {field.name for field in dataclasses.fields(inputs)}:
        spec.input_class = inputs
    spec.output_class = outputs
    spec.complete(process_class)
    return spec


def fields_of(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass instance; their values are left as they are."""
    return {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}


def _port(
    kind: type[Port],
    name: str,
    valid_type: Any,
    required: bool | None,
    default: Any,
    validator: Validator | None,
    help: str | None,
) -> Port:
    types = types_of(valid_type, name)
    if default is None and types is not None and NoneType not in types:
        types = (*types, NoneType)
    if required is None:
        required = default is MISSING
    port = kind(name.rpartition(".")[2], types, required, default, validator or choices_of(valid_type), help)
    if default is not MISSING and default is not None and not callable(default):
        problem = port.problem(default)
        if problem is not None:
            raise SpecError(f"the default of {name!r} does not fit its own port: {problem}")
    return port


def _add_fields(space: PortNamespace, fields: Any, kind: type[Port], process_class: type[Process]) -> None:
    where = f"{process_class.__qualname__}.{getattr(fields, '__name__', fields)}"
    if not (isinstance(fields, type) and dataclasses.is_dataclass(fields)):
        raise SpecError(f"{where} must be a dataclass; put @dataclass(frozen=True) above it")
    try:
        annotations = typing.get_type_hints(fields, include_extras=True)
    except Exception as error:  # evaluating annotations runs the user's expressions
        raise SpecError(
            f"{where}: an annotation can't be read ({error}); its names must be importable from the module at run time"
        ) from error
    for field in dataclasses.fields(fields):
        if not field.init:
            raise SpecError(f"{where}.{field.name}: a field with init=False can't be given by anybody")
        default: Any = MISSING
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory
        elif field.default is not dataclasses.MISSING:
            default = _constant(field.default) if callable(field.default) else field.default
        help = field.metadata.get("help")
        space.add(field.name, _port(kind, field.name, annotations[field.name], None, default, None, help))


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def _expose(
    space: PortNamespace,
    other: PortNamespace,
    namespace: str | None,
    include: Iterable[str] | None,
    exclude: Iterable[str] | None,
) -> None:
    if namespace is not None:
        try:
            inner = space.find(namespace)
        except SpecError:
            inner = PortNamespace(namespace.rpartition(".")[2])
            space.add(namespace, inner)
        if not isinstance(inner, PortNamespace):
            raise SpecError(f"{namespace!r} is a port, so nothing can be exposed in it")
        space = inner
    space.merge(other, include, exclude)
