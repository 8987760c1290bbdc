"""The example computes what a plain script computes, and its demonstration works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import prunus
import reference
from workflow import METALS, EquationOfState

DEMO = Path(__file__).resolve().parents[2] / "examples" / "equation_of_state" / "demo.py"


@pytest.mark.parametrize("metal", METALS)
def test_a_run_alone_agrees_with_the_plain_script(metal: str, tmp_path: Path) -> None:
    """`prunus.run` without a daemon gives the numbers of the script, and a plot."""
    result = prunus.run(EquationOfState, {"element": metal, "folder": str(tmp_path)})
    found = (result.outputs.lattice_constant, result.outputs.bulk_modulus)
    assert found == pytest.approx(reference.equation_of_state(metal), rel=1e-9)
    assert result.outputs.volume == pytest.approx(result.outputs.lattice_constant**3 / 4)
    assert Path(result.outputs.plot).read_bytes().startswith(b"\x89PNG")


def test_the_numbers_are_near_those_of_nature(tmp_path: Path) -> None:
    """Copper: 3.61 Å and 140 GPa; a model potential comes within a few percent."""
    outputs = prunus.run(EquationOfState, {"element": "Cu", "folder": str(tmp_path)}).outputs
    assert outputs.lattice_constant == pytest.approx(3.61, rel=0.02)
    assert outputs.bulk_modulus == pytest.approx(140, rel=0.1)


def test_a_wrong_element_is_refused_by_name() -> None:
    """Every wrong input is named before anything is computed."""
    with pytest.raises(prunus.InvalidInputError) as caught:
        prunus.run(EquationOfState, {"element": "Unobtainium", "delay_s": "long"})
    assert set(caught.value.problems) == {"inputs.element", "inputs.delay_s"}


@pytest.mark.timeout(120)
def test_the_demonstration_ends_well(tmp_path: Path) -> None:
    """With a worker killed on the way, a daemon's numbers are those of the script, and it is gone afterwards."""
    done = subprocess.run(
        [sys.executable, DEMO, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].startswith("All is well")
    assert len(list(tmp_path.glob("*.png"))) == len(METALS)
