"""What a file holds, beside what a model needs: every name accounted for, in a sentence or in a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from ldm.files.config import write_json

Shape = tuple[int, ...]
FIRST = 3  # names in a sentence


@dataclass(frozen=True)
class Report:
    """The differences between the tensors of a file and those of a model, by name.

    extras: names that no model needs and that are known, each with what it is. They do no harm.
    """

    source: str  # the file
    target: str  # the model
    total: int  # tensors that the model needs
    unused: dict[str, Shape] = field(default_factory=dict)  # in the file alone
    missing: dict[str, Shape] = field(default_factory=dict)  # in the model alone
    misshapen: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)  # (the file's, the model's)
    extras: dict[str, str] = field(default_factory=dict)

    @classmethod
    def compare(
        cls,
        want: Mapping[str, Shape],
        have: Mapping[str, Shape],
        source: str | Path,
        target: str,
        extras: Mapping[str, str] | None = None,
    ) -> Self:
        """want: shapes in the model. have: shapes in the file. extras: of the file, without those wanted."""
        known = {name: why for name, why in (extras or {}).items() if name not in want}
        return cls(
            source=str(source),
            target=target,
            total=len(want),
            unused={name: have[name] for name in sorted(have.keys() - want.keys() - known.keys())},
            missing={name: want[name] for name in sorted(want.keys() - have.keys())},
            misshapen={
                name: (have[name], want[name])
                for name in sorted(want.keys() & have.keys())
                if have[name] != want[name]
            },
            extras=known,
        )

    @property
    def fits(self) -> bool:
        return not (self.unused or self.missing or self.misshapen)

    def sentence(self) -> str:
        """How the file differs, with the first names; or that it does not, and what else it holds."""
        if self.fits:
            kinds = Counter(self.extras.values())
            rest = "; ".join(f"{count} of {why}" for why, count in kinds.items())
            unread = f"; passed over: {rest}" if rest else ""
            return f"{self.source} fits {self.target}: all of its {self.total} tensors{unread}"
        rows = [(name, str(have), str(want)) for name, (have, want) in self.misshapen.items()]
        rows += [(name, "-", str(shape)) for name, shape in self.missing.items()]
        rows += [(name, str(shape), "-") for name, shape in self.unused.items()]
        lines = [f"  {name}: file {have}, model {want}" for name, have, want in sorted(rows)[:FIRST]]
        counts = (("missing", self.missing), ("unknown", self.unused), ("of another shape", self.misshapen))
        kinds_of = ", ".join(f"{len(names)} {kind}" for kind, names in counts if names)
        return "\n".join(
            [
                f"{self.source} does not fit {self.target}: {len(rows)} of {self.total} tensors differ, "
                f"{kinds_of}, the first",
                *lines,
            ]
        )

    def check(self, advice: str = "") -> Self:
        """Itself. Raises Misfit with the sentence, and the advice after it, unless the file fits."""
        if not self.fits:
            raise Misfit(self, advice)
        return self

    def content(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {"fits": self.fits, **asdict(self)}


def write_reports(reports: Iterable[Report], path: Path) -> None:
    """All names of these reports, as JSON, by the file that each is of."""
    write_json(path, {report.source: report.content() for report in reports})


class Misfit(ValueError):
    """A file that does not fit a model. The message is the report's sentence."""

    def __init__(self, report: Report, advice: str = "") -> None:
        super().__init__(report.sentence() + (f"\n{advice}" if advice else ""))
        self.report = report
