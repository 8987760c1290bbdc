"""The equation of state of a metal: how its energy depends on its volume.

::

    EquationOfState
      relax   submits one RelaxLattice: the lattice constant of lowest energy
      scan    submits one EnergyAtScale for each strain around it: they run side by side
      fit     fits a Birch-Murnaghan curve, draws it and gives out volume, bulk modulus and lattice constant

Energies come from ASE's effective medium theory (EMT) for fcc crystals. What computes is a plain ``def``
step: it runs in a worker thread and blocks nobody. What waits is an ``async def`` step.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import ase.build
import ase.calculators.emt
import ase.data
import ase.eos
import ase.units
import matplotlib.figure
import scipy.optimize

from prunus import Continue, Process, ProcessSpec, WorkChain, append_


def untyped(module: ModuleType) -> Any:
    """`module` without what it says of its types, which is incomplete and in part wrong."""
    return module


bulk = untyped(ase.build).bulk
EMT = untyped(ase.calculators.emt).EMT
atomic_numbers = untyped(ase.data).atomic_numbers
reference_states = untyped(ase.data).reference_states
birchmurnaghan = untyped(ase.eos).birchmurnaghan
Curve = untyped(ase.eos).EquationOfState
GPa = untyped(ase.units).GPa
Figure = untyped(matplotlib.figure).Figure
minimize_scalar = untyped(scipy.optimize).minimize_scalar

METALS = ("Cu", "Al", "Ni", "Ag", "Au", "Pd", "Pt")
"""The elements that EMT describes and that crystallise as fcc."""
SCALES = (0.94, 0.96, 0.98, 1.0, 1.02, 1.04, 1.06)
"""The strains, as scales of the lattice constant."""
LATTICE_TOLERANCE = 1e-8
"""To which the relaxed lattice constant is found (Å)."""
PLOT_POINTS = 200


class RelaxLattice(Process):
    """The lattice constant of lowest energy."""

    @dataclass(frozen=True)
    class Inputs:
        element: str

    @dataclass(frozen=True)
    class Outputs:
        lattice_constant: float  # Å
        energy: float  # eV per atom

    def run(self) -> Outputs:
        element = self.inputs.element
        measured = reference_states[atomic_numbers[element]]["a"]
        relaxed = minimize_scalar(
            partial(energy, element),
            bounds=(0.9 * measured, 1.1 * measured),
            method="bounded",
            options={"xatol": LATTICE_TOLERANCE},
        )
        return self.Outputs(lattice_constant=float(relaxed.x), energy=float(relaxed.fun))


class EnergyAtScale(Process):
    """The energy of a crystal whose lattice constant is scaled."""

    @dataclass(frozen=True)
    class Inputs:
        element: str
        lattice_constant: float  # Å, of the crystal without strain
        scale: float = 1.0
        delay_s: float = 0.0  # as if the calculation took this much longer

    @dataclass(frozen=True)
    class Outputs:
        volume: float  # Å³ per atom
        energy: float  # eV per atom

    async def run(self) -> Continue:
        await asyncio.sleep(self.inputs.delay_s)
        return Continue(self.compute)

    def compute(self) -> Outputs:
        a = self.inputs.scale * self.inputs.lattice_constant
        return self.Outputs(volume=a**3 / 4, energy=energy(self.inputs.element, a))


class EquationOfState(WorkChain):
    """Volume, bulk modulus and lattice constant at equilibrium, with a plot."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("element", valid_type=str, validator=known_to_emt, help="the symbol of an fcc metal")
        spec.input("scales", valid_type=list, default=lambda: list(SCALES), help="strains of the lattice constant")
        spec.input("delay_s", valid_type=float, default=0.0, help="added to each energy, in seconds")
        spec.input("folder", valid_type=str, default=".", help="where the plot is written")
        spec.output("volume", valid_type=float, help="Å³ per atom")
        spec.output("bulk_modulus", valid_type=float, help="GPa")
        spec.output("lattice_constant", valid_type=float, help="Å")
        spec.output("plot", valid_type=str, help="the path of a PNG")
        spec.outline(cls.relax, cls.scan, cls.fit)

    async def relax(self) -> None:
        self.to_context(relaxed=self.submit(RelaxLattice, {"element": self.inputs.element}))

    async def scan(self) -> None:
        for scale in self.inputs.scales:
            strained = {
                "element": self.inputs.element,
                "lattice_constant": self.ctx.relaxed.outputs.lattice_constant,
                "scale": scale,
                "delay_s": self.inputs.delay_s,
            }
            self.to_context(points=append_(self.submit(EnergyAtScale, strained)))

    def fit(self) -> None:
        volumes = [point.outputs.volume for point in self.ctx.points]
        energies = [point.outputs.energy for point in self.ctx.points]
        parameters = Curve(volumes, energies, "birchmurnaghan")
        volume, _, bulk_modulus = parameters.fit(warn=False)
        path = Path(self.inputs.folder).resolve() / f"{self.inputs.element}.png"
        draw(path, self.inputs.element, volumes, energies, parameters.eos_parameters)
        self.out("volume", float(volume))
        self.out("bulk_modulus", float(bulk_modulus / GPa))
        self.out("lattice_constant", float((4 * volume) ** (1 / 3)))
        self.out("plot", str(path))


def known_to_emt(element: str) -> str | None:
    """What is wrong with `element`, if anything: a validator."""
    return None if element in METALS else f"EMT knows no fcc {element!r}; it knows {', '.join(METALS)}"


def energy(element: str, a: float) -> float:
    """The energy (eV per atom) of the fcc crystal with the lattice constant `a` (Å)."""
    crystal = bulk(element, "fcc", a=a)
    crystal.calc = EMT()
    return float(crystal.get_potential_energy())


def draw(
    path: Path, element: str, volumes: list[float], energies: list[float], parameters: tuple[float, float, float, float]
) -> None:
    """Draw the points and the fitted curve. A second call with the same path replaces the file."""
    lowest, highest = min(volumes), max(volumes)
    between = [lowest + (highest - lowest) * i / (PLOT_POINTS - 1) for i in range(PLOT_POINTS)]
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(between, [birchmurnaghan(v, *parameters) for v in between], label="Birch-Murnaghan")
    axes.plot(volumes, energies, "o", label="EMT")
    axes.set(xlabel="volume (Å³ per atom)", ylabel="energy (eV per atom)", title=f"Equation of state of {element}")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
