"""The same numbers without Prunus: one plain script, to check the workflow against.

    python reference.py

For each metal: find the lattice constant of lowest energy, compute the energy at seven strains around it,
fit a Birch-Murnaghan curve. The energies come from ASE's effective medium theory (EMT), a model potential
that is good enough for trends and takes milliseconds.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import ase.build
import ase.calculators.emt
import ase.data
import ase.eos
import ase.units
import scipy.optimize


def untyped(module: ModuleType) -> Any:
    """`module` without what it says of its types, which is incomplete and in part wrong."""
    return module


bulk = untyped(ase.build).bulk
EMT = untyped(ase.calculators.emt).EMT
atomic_numbers = untyped(ase.data).atomic_numbers
reference_states = untyped(ase.data).reference_states
EquationOfState = untyped(ase.eos).EquationOfState
GPa = untyped(ase.units).GPa
minimize_scalar = untyped(scipy.optimize).minimize_scalar

METALS = ("Cu", "Al", "Ni", "Ag", "Au", "Pd", "Pt")
SCALES = (0.94, 0.96, 0.98, 1.0, 1.02, 1.04, 1.06)
"""Of the lattice constant."""


def energy(element: str, a: float) -> float:
    """The energy (eV per atom) of the fcc crystal with the lattice constant `a` (Å)."""
    crystal = bulk(element, "fcc", a=a)
    crystal.calc = EMT()
    return float(crystal.get_potential_energy())


def equation_of_state(element: str) -> tuple[float, float]:
    """The lattice constant (Å) and the bulk modulus (GPa)."""
    measured = reference_states[atomic_numbers[element]]["a"]
    relaxed = minimize_scalar(
        partial(energy, element),
        bounds=(0.9 * measured, 1.1 * measured),
        method="bounded",
        options={"xatol": 1e-8},
    )
    constants = [scale * float(relaxed.x) for scale in SCALES]
    fit = EquationOfState([a**3 / 4 for a in constants], [energy(element, a) for a in constants], "birchmurnaghan")
    volume, _, bulk_modulus = fit.fit(warn=False)
    return float((4 * volume) ** (1 / 3)), float(bulk_modulus / GPa)


if __name__ == "__main__":
    print("metal     a0 (Å)    B (GPa)")
    for metal in METALS:
        a0, b = equation_of_state(metal)
        print(f"{metal:<5} {a0:10.6f} {b:10.4f}")
