"""What this machine can do for Livebrush and what is wrong with it: one screen, each fault with its cure.

`doctor_checks` looks around, `doctor_measure` starts the engine. Nothing outside this machine is asked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from engine.api import Engine, EngineError
from engine.choose import Choice
from engine.client import LocalEngine
from server.doctor_checks import REINSTALL, Finding, Level, check_choice, look_around
from server.doctor_measure import Measured, check_costs, judge, measure_engine
from server.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, and the measurement where one was made."""

    findings: tuple[Finding, ...]
    measured: Measured | None

    @property
    def can_serve(self) -> bool:
        """Whether nothing found prevents serving."""
        return all(finding.level is not Level.PROBLEM for finding in self.findings)


EngineFactory = Callable[[ServerSettings], Engine]


async def examine(
    settings: ServerSettings,
    *,
    choice: Choice | None = None,
    refusal: str = "",
    measure: bool = True,
    make_engine: EngineFactory = lambda settings: LocalEngine(settings.engine),
) -> Report:
    """Look at everything; with `measure`, start the engine for a few seconds. Never raises for a faulty machine.

    choice: what `serve` would run here and why. refusal: why it would refuse the settings; `settings` are then others.
    """
    findings = await asyncio.to_thread(look_around, settings)
    model_is_sound = all(finding.name != "model" or finding.level is not Level.PROBLEM for finding in findings)
    if model_is_sound:
        findings += check_choice(choice, refusal)
    if not measure:
        return Report(tuple(findings), None)
    if any(finding.level is Level.PROBLEM for finding in findings):
        skipped = Finding("speed", Level.WARNING, "not measured", "cure the problems above first")
        return Report((*findings, skipped), None)
    try:
        measured = await measure_engine(make_engine(settings), settings)
    except (EngineError, OSError, TimeoutError) as error:
        text = f"the engine does not start: {error or type(error).__name__}"
        cure = f"{REINSTALL}; `livebrush serve` prints the engine's own messages"
        return Report((*findings, Finding("speed", Level.PROBLEM, text, cure)), None)
    return Report((*findings, *check_costs(measured), judge(measured, settings)), measured)


def to_text(report: Report) -> str:
    """The screen."""
    width = max(len(finding.name) for finding in report.findings)
    lines = []
    for finding in report.findings:
        lines.append(f"{finding.level:<8} {finding.name:<{width}}  {finding.text}")
        if finding.cure:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.cure}")
    lines.append(
        "This machine can serve." if report.can_serve else "This machine cannot serve: cure the problems above."
    )
    return "\n".join(lines)


def to_json(report: Report) -> str:
    """The same for machines: {"can_serve", "findings": [...], "measured": {...} or null}."""
    measured = asdict(report.measured) if report.measured else None
    findings = [asdict(finding) for finding in report.findings]
    return json.dumps({"can_serve": report.can_serve, "findings": findings, "measured": measured}, indent=1)
