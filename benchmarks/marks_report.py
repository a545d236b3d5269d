"""The report of `marks.py`: its measurements compared with the marks."""

from collections.abc import Sequence
from dataclasses import dataclass

from lineardit.distill.evaluate import Comparison
from lineardit.distill.metrics import Interval


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model on the first `pictures` held-out captions; `comparison` is with the teacher's pictures of these."""

    name: str
    pictures: int
    scores: dict[str, tuple[int, int]]
    seconds_per_picture: float
    comparison: Comparison | None

    def share(self, score: str) -> float:
        right, total = self.scores[score]
        return right / total


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A target and a measurement, as text with units."""

    name: str
    target: str
    measured: str
    met: bool


def teacher_marks(teacher: Row, long: Row | None) -> list[Mark]:
    """The trained model itself; `long`: its default call with 512 text positions, once it is made."""
    marks = [
        Mark(
            name=f"teacher: {score}",
            target=f"at least {least}%",
            measured=_percent(teacher.share(score)),
            met=teacher.share(score) >= least / 100,
        )
        for score, least in (("objects", 90), ("coherence", 85))
    ]
    differences = long.comparison.differences if long and long.comparison else {}
    return marks + [
        _difference(f"teacher with 512 text positions: {score}", interval, -2)
        for score, interval in differences.items()
    ]


def student_marks(name: str, student: Row, untrained: Row | None) -> list[Mark]:
    """The student against the teacher, and against the window without training, once that is made."""
    assert student.comparison is not None
    marks = [
        _difference(f"{name}: objects", student.comparison.differences["objects"], -3),
        _difference(f"{name}: coherence", student.comparison.differences["coherence"], -5),
    ]
    if untrained and untrained.comparison:
        share = student.comparison.latent_mse / untrained.comparison.latent_mse
        measured = f"{student.comparison.latent_mse:.4f} / {untrained.comparison.latent_mse:.4f} = {share:.3f}"
        target = "at most 1/3 of the window's without training"
        marks.append(
            Mark(name=f"{name}: latent MSE to the teacher", target=target, measured=measured, met=share <= 1 / 3)
        )
    return marks


def follow_mark(name: str, student: Row) -> Mark:
    """The mark of a student that only has to follow its captions."""
    assert student.comparison is not None
    return _difference(f"{name}: objects", student.comparison.differences["objects"], -5)


def rival_marks(pairs: Sequence[tuple[Row, Row]]) -> list[Mark]:
    """The hybrid against local attention of equal FLOPs, each pair from one seed, on the same captions."""
    if not pairs:
        return []
    seeds = f"{len(pairs)} seed" + "s" * (len(pairs) > 1)
    where = f"hybrid and window of equal cost, {seeds}, {pairs[0][0].pictures} captions"
    coherence = [(one.share("coherence"), other.share("coherence")) for one, other in pairs]
    errors = [(_latent_mse(one), _latent_mse(other)) for one, other in pairs]
    return [
        Mark(
            name=f"{where}: coherence",
            target="the hybrid's higher on every seed",
            measured="; ".join(f"{_percent(one)} and {_percent(other)}" for one, other in coherence),
            met=all(one > other for one, other in coherence),
        ),
        Mark(
            name=f"{where}: latent MSE",
            target="the hybrid's lower on every seed",
            measured="; ".join(f"{one:.4f} and {other:.4f}" for one, other in errors),
            met=all(one < other for one, other in errors),
        ),
    ]


def _latent_mse(row: Row) -> float:
    assert row.comparison is not None
    return row.comparison.latent_mse


def _difference(name: str, interval: Interval, least: int) -> Mark:
    return Mark(
        name=name,
        target=f"at most {-least} points below the teacher",
        measured=points(interval),
        met=100 * interval.difference >= least,
    )


def points(interval: Interval) -> str:
    low, high = 100 * interval.low, 100 * interval.high
    return f"{100 * interval.difference:+.1f} points (95%: {low:+.1f} to {high:+.1f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def as_markdown(title: str, rows: Sequence[Row], marks: Sequence[Mark]) -> str:
    """The report in Markdown."""
    lines = [
        "# Marks of the main job",
        "",
        title,
        "",
        "| mark | target | measured | met |",
        "| --- | --- | --- | --- |",
        *(f"| {m.name} | {m.target} | {m.measured} | {'yes' if m.met else '**no**'} |" for m in marks),
        "",
        *rows_as_markdown(rows),
        "",
        "![pictures of the teacher and its students](marks.png)",
        "",
    ]
    return "\n".join(lines)


def rows_as_markdown(rows: Sequence[Row]) -> list[str]:
    """The lines of a table of models."""
    lines = [
        "| model | captions | objects | coherence | objects against the teacher | latent MSE | PSNR, dB | SSIM |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        scores = " | ".join(_percent(row.share(score)) for score in ("objects", "coherence"))
        compared = " |  |  | "
        if row.comparison:
            c = row.comparison
            compared = f"{points(c.differences['objects'])} | {c.latent_mse:.4f} | {c.psnr:.2f} | {c.ssim:.4f}"
        lines.append(f"| {row.name} | {row.pictures} | {scores} | {compared} |")
    return lines
