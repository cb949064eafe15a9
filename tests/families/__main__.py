"""Try every family, and write the table into README.md: `make families`. Some two minutes on two cores."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import transformers

from tests.families.small import OTHERS, SOME
from tests.families.trial import Trial, try_families

_README = Path(__file__).resolve().parents[2] / "README.md"
_BEGIN, _END = "<!-- made by `make families` -->\n", "<!-- end -->"
_AT_A_TIME = 30  # in one pair of processes


def main(names: Sequence[str]) -> int:
    """Try families, all of them by default; only then the table is written.

    Returns:
        The exit status: 1 if one of those that `make test` tries falls short.
    """
    wanted = sorted(names or [*SOME, *OTHERS])
    trials: list[Trial] = []
    for first in range(0, len(wanted), _AT_A_TIME):
        with tempfile.TemporaryDirectory() as root:
            some = try_families(wanted[first : first + _AT_A_TIME], root)
        for trial in some:
            print("fine" if trial.fine else "FALLS SHORT", trial, flush=True)
        trials += some
    print(text := table(trials))
    if not names:
        before, _, rest = _README.read_text().partition(_BEGIN)
        _, _, after = rest.partition(_END)
        _README.write_text(f"{before}{_BEGIN}{text}{_END}{after}")
    return int(any(not trial.fine for trial in trials if trial.model_type in SOME))


def table(trials: Sequence[Trial]) -> str:
    """Families that do all that is asked of them by what they have in common, then the others one by one."""
    fine = [trial for trial in trials if trial.fine]
    lines = [f"{len(fine)} families with transformers {transformers.__version__}:\n"]
    lines += ["| families | attention | loss without logits | two ranks beside one |", "|---|---|---|---|"]
    kinds = sorted({(trial.attention, trial.without_logits) for trial in fine}, reverse=True)
    for attention, without_logits in kinds:
        alike = [each for each in fine if (each.attention, each.without_logits) == (attention, without_logits)]
        families = ", ".join(each.model_type for each in alike)
        largest = max(each.step for each in alike)
        lines.append(f"| {families} | {attention} | {'yes' if without_logits else 'no'} | {largest:.0e} |")
    lines += [
        f"| {trial.model_type}: {_why(trial)} | {trial.attention} | - | - |" for trial in trials if not trial.fine
    ]
    return "\n".join(lines) + "\n"


def _why(trial: Trial) -> str:
    if trial.loaded and trial.saved and trial.generated and not trial.from_config:
        return "from a directory only, as its constructor sets what its rule for first values does not"
    wrong = {
        "other logits": trial.attention and not trial.loaded,
        f"gradients {trial.step:.0e} apart": trial.attention and trial.step > 1e-5,
        "not read back": trial.attention and not trial.saved,
    }
    return "; ".join([*(text for text, is_so in wrong.items() if is_so), *([trial.error[:120]] if trial.error else [])])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
