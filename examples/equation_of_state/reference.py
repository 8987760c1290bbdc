"""The same numbers without Prunus: one plain script, to check the workflow against.

    python reference.py

For each metal: find the lattice constant of lowest energy, compute the energy at seven strains around it,
fit a Birch-Murnaghan curve. The energies come from ASE's effective medium theory (EMT), a model potential
that is good enough for trends and takes milliseconds.
"""

from __future__ import annotations

from ase.build import bulk
from ase.calculators.emt import EMT
from ase.data import atomic_numbers, reference_states
from ase.eos import EquationOfState
from ase.units import GPa
from scipy.optimize import minimize_scalar

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
        lambda a: energy(element, a),
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
