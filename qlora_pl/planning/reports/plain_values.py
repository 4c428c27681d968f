"""A report as plain values: what ``qlora-pl plan --json`` prints."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from qlora_pl.planning.advice.published import published
from qlora_pl.planning.advice.remedies import Remedy
from qlora_pl.planning.memory.storage import bits_per_weight
from qlora_pl.planning.reports.report import CardResult, Report
from qlora_pl.planning.work.step_work import work_of


def plain_values(report: Report) -> dict[str, Any]:
    """Every number in plain types, sizes in bytes."""
    run, s = report.run, report.setting
    work, batch = work_of(run.shape, s), run.batch(s)
    counts = round(batch.tokens), round(batch.trained), round(batch.pairs)
    found = published(run.shape, s)
    return {
        "name": run.name,
        "base": run.base,
        "notes": list(report.notes),
        "num_weights": run.shape.num_weights,
        "num_trained": report.plan.num_trained,
        "bits_per_weight": bits_per_weight(run.shape, s) if s.is_quantized else None,
        "setting": asdict(s),
        "components": dict(report.plan.components),
        "moment": report.plan.moment,
        "total": report.plan.total,
        "before_overhead": report.plan.before_overhead,
        "pageable": report.plan.pageable,
        "host": dict(report.plan.host),
        "activations": {
            "with_checkpointing": report.plan.activations.kept(True),
            "without_checkpointing": report.plan.activations.kept(False),
            "by_layer": list(report.plan.activations.layers),
        },
        "num_steps": run.num_steps,
        "model_flops_per_token": work.model_flops(*counts) / max(1, counts[0]),
        "hardware_flops_per_token": work.hardware_flops(*counts) / max(1, counts[0]),
        "decoding_bytes_per_micro_batch": work.decoding_bytes,
        "elementwise_bytes_per_token": work.elementwise_bytes(counts[0]) / max(1, counts[0]),
        "verdict": None if report.chosen is None else _plain_result(report.chosen),
        "remedies": None
        if report.advice is None
        else [_plain_remedy(remedy) for remedy in report.advice.remedies],
        "alternatives": [asdict(other) for other in report.alternatives],
        "cards": [_plain_result(result) for result in report.cards],
        "paper": None if found is None else asdict(found),
        "disk": asdict(run.disk()) | {"total": run.disk().total},
    }


def _plain_result(result: CardResult) -> dict[str, Any]:
    return {
        "card": asdict(result.card),
        "kind": result.verdict.kind,
        "spare_bytes": result.verdict.spare_bytes,
        "missing_bytes": result.verdict.missing_bytes,
        "total": result.plan.total,
        "compute_dtype": result.setting.compute_dtype,
        "strategy": result.setting.strategy,
        "time": None if result.time is None else asdict(result.time),
    }


def _plain_remedy(remedy: Remedy) -> dict[str, Any]:
    return {
        "words": remedy.words,
        "keys": remedy.keys,
        "yaml": remedy.yaml,
        "cost": remedy.cost,
        "kind": remedy.verdict.kind,
        "total": remedy.plan.total,
        "slowdown": remedy.slowdown,
    }
