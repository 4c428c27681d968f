"""A report in words: what ``qlora-pl plan`` prints."""

from __future__ import annotations

import textwrap

from qlora_pl.planning.advice.published import CLAIM, FULL_65B_GB, published
from qlora_pl.planning.advice.remedies import Advice, Remedy
from qlora_pl.planning.memory.memory_plan import COMPONENTS, MemoryPlan
from qlora_pl.planning.memory.storage import bits_per_weight
from qlora_pl.planning.memory.training_setting import TrainingSetting
from qlora_pl.planning.reports.report import CardResult, Report, result_on
from qlora_pl.planning.runs.planned_run import PlannedRun
from qlora_pl.planning.work.cards import GIB, card_named
from qlora_pl.planning.work.operations import BANDWIDTH_EFFICIENCY, PRODUCT_EFFICIENCY
from qlora_pl.planning.work.step_work import work_of

GB = 1e9
WIDTH = 42
COLUMNS = 100


def text_of(report: Report) -> str:
    """The report as a person reads it."""
    table = component_table(report.plan, report.setting)
    parts = [
        _head(report),
        f"{table}\n{_activations(report)}",
        _verdict(report),
        _advice(report),
        _alternatives(report),
        _work(report),
        _cards(report),
        _paper(report),
        _disk(report),
    ]
    return "\n\n".join(wrapped(part) for part in parts if part)


def _head(report: Report) -> str:
    s, shape = report.setting, report.run.shape
    lines = [titled(report.run, s)]
    rows = f"{s.batch_size} row{'s' * (s.batch_size != 1)} of {s.tokens_per_row:,} tokens"
    if shape.num_encoder_layers:
        rows += f" and {s.target_tokens_per_row or s.tokens_per_row:,} of the target"
    again = "recomputed" if s.gradient_checkpointing else "kept"
    lines.append(
        f"  largest micro-batch {rows}, {s.num_micro_batches} in a step, activations {again}"
    )
    lines.append(
        f"  {s.num_devices} device{'s' * (s.num_devices != 1)}"
        f"{'' if s.num_devices == 1 else f' ({s.strategy})'}, "
        f"{s.optimizer}, products in {s.compute_dtype}"
    )
    lines += [f"  {note}" for note in report.notes]
    return "\n".join(lines)


def _activations(report: Report) -> str:
    acts = report.plan.activations
    widest = max(acts.layers)
    return (
        f"  Activations of a micro-batch: {_gb(acts.kept(True))} with checkpointing, "
        f"{_gb(acts.kept(False))} without ({_gb(widest)} a layer)."
    )


def _verdict(report: Report) -> str:
    if report.chosen is None:
        return ""
    card = report.chosen.card
    lines = [f"{card.name}: {report.chosen.verdict.sentence(card)}"]
    if not card.has_bfloat16 and report.setting.compute_dtype == "bfloat16":
        lines.append(
            f"  A {card.name} only emulates bfloat16, many times slower than float16; set "
            "model.quantization.compute_dtype: float16, or leave it at auto."
        )
    return "\n".join(lines)


def _advice(report: Report) -> str:
    if report.advice is None or report.chosen is None:
        return ""
    pages = report.chosen.verdict.fits
    if not report.advice.remedies:
        return "" if pages else _no_remedy(report.advice)
    title = f"What would make it fit{' without paging' if pages else ''}, the cheapest first:"
    blocks = [_remedy(place + 1, r) for place, r in enumerate(report.advice.remedies)]
    return "\n".join([title, *blocks])


def _alternatives(report: Report) -> str:
    if not report.alternatives:
        return ""
    others = " and ".join(
        f"{other.reduction:.0%} less than {other.name} ({_gb(other.before_overhead)})"
        for other in report.alternatives
    )
    ours = _gb(report.plan.before_overhead)
    claim = f" The paper claims {CLAIM}." if published(report.run.shape, report.setting) else ""
    return f"Before overhead that is {ours}: {others}.{claim}"


def _work(report: Report) -> str:
    s = report.setting
    work, batch = work_of(report.run.shape, s), report.run.batch(s)
    counts = round(batch.tokens), round(batch.trained), round(batch.pairs)
    model = work.model_flops(*counts) / max(1, counts[0]) / 1e9
    hardware = work.hardware_flops(*counts) / max(1, counts[0]) / 1e9
    decoding = work.decoding_bytes / max(1, counts[0]) / 1e6
    moved = work.elementwise_bytes(counts[0]) / max(1, counts[0]) / 1e6
    frozen = "frozen base: 4 operations a weight" if s.has_adapters else "every weight trained"
    again = f", {hardware:,.1f} with what is recomputed" if s.gradient_checkpointing else ""
    packed = f", {decoding:,.1f} MB of decoding" if work.packed else ""
    return (
        f"A token: {model:,.1f} GFLOP ({frozen}){again}; {moved:,.1f} MB moved between "
        f"products{packed}."
    )


def _cards(report: Report) -> str:
    timed = [result for result in report.cards if result.time is not None]
    if not timed:
        return ""
    steps = report.run.num_steps
    of_run = "" if steps is None else f" for {steps:,} steps"
    lines = [
        f"Estimated time and price{of_run}, at {PRODUCT_EFFICIENCY:.0%} of a card's peak in "
        f"products and {BANDWIDTH_EFFICIENCY:.0%} of its bandwidth (assumed):",
        f"  {'card':11}{'GiB':>6}  {'verdict':17}{'tokens/s':>9}{'HFU':>6}{'MFU':>6}"
        f"{'hours':>8}{'kWh':>8}{'US$':>9}",
    ]
    lines += [f"  {_card_line(result)}" for result in timed]
    if report.is_longest:
        lines.append(
            "  That is with every row at its longest; --mean-length N says how long they are."
        )
    return "\n".join(lines)


def _paper(report: Report) -> str:
    found = published(report.run.shape, report.setting)
    if found is None:
        return ""
    dtype = report.setting.adapter_dtype
    lines = [
        f"The paper, for this size (batch 1, length 512, r 64; this plan has adapters in {dtype}):",
        f"  figure 6: {found.figure6_gb} GB; here {report.plan.before_overhead / GB:.1f} GB "
        f"before overhead, {report.plan.total / GB:.1f} GB with it.",
    ]
    if found.statement:
        lines.append(f"  {found.statement}.")
    lines += [f"  {_hours_beside(report, name)}" for name in found.cards]
    if found.name == "llama-65b":
        lines.append(f"  Full fine-tuning in 16 bits takes more than {FULL_65B_GB} GB.")
    return "\n".join(lines)


def _hours_beside(report: Report, name: str) -> str:
    """Our own estimate on a card of the kind that the paper speaks of."""
    result = result_on(report.run, card_named(name))
    if result.time is None or result.time.hours is None:
        return f"Here the number of steps is not known, so that no hours follow for {name}."
    longest = ", with every row at its longest" if report.is_longest else ""
    return (
        f"Here an estimated {result.time.hours:,.1f} hours on one {name} for "
        f"{report.run.num_steps:,} steps{longest}; the plan {result.verdict.kind} there."
    )


def _disk(report: Report) -> str:
    disk = report.run.disk()
    parts = []
    if disk.download:
        parts.append(f"{_gb(disk.download)} to download the base")
    if disk.packed_copy:
        parts.append(f"{_gb(disk.packed_copy)} for its packed copy")
    parts.append(
        f"{_gb(disk.checkpoint + disk.product)} for each checkpoint with its folder, of which "
        f"{disk.num_checkpoints} are kept"
    )
    return f"Disk: {_gb(disk.total)}: {', '.join(parts)}."


def titled(run: PlannedRun, s: TrainingSetting) -> str:
    """A run's name and what it is."""
    words = setting_words(run, s)
    return words if words.startswith(run.name) else f"{run.name}: {words}"


def wrapped(text: str) -> str:
    """Lines of at most ``COLUMNS``, what follows indented as its line is, and a little more."""
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        if len(line) > COLUMNS:
            line = textwrap.fill(line, COLUMNS, subsequent_indent=indent, break_on_hyphens=False)
        lines.append(line)
    return "\n".join(lines)


def setting_words(run: PlannedRun, s: TrainingSetting) -> str:
    """Base, storage and what is trained, in one line."""
    base = f"{run.base} ({run.shape.num_weights / 1e9:,.2f} billion weights)"
    if s.is_quantized:
        bits = bits_per_weight(run.shape, s)
        twice = " with double quantisation" if s.is_four_bits and s.double_quant else ""
        kept = f"{s.quant_type.upper()}{twice}, {bits:.3f} bits a weight"
    else:
        kept = f"not quantised, in {s.rest_dtype}"
    if not s.has_adapters:
        return f"{base}, {kept}, every weight trained"
    where = "all linear modules"
    if s.target_modules != "all-linear":
        names = s.target_modules
        where = names if isinstance(names, str) else ", ".join(names)
    num = run.plan(None).num_trained
    return (
        f"{base}, {kept}, {'DoRA' if s.method == 'dora' else 'LoRA'} r {s.r} on {where} "
        f"({num:,} weights in {s.adapter_dtype})"
    )


def component_table(plan: MemoryPlan, setting: TrainingSetting) -> str:
    """The components of a plan in GB and as shares, at the fullest moment of a step."""
    each = "" if setting.num_devices == 1 else " on each device"
    lines = [f"{f'at its fullest ({plan.moment}){each}':{WIDTH}}{'GB':>9}{'share':>8}"]
    for name, size in plan.components.items():
        if size or name in ("adapters", "gradients", "activations"):
            if name == "overhead":
                lines.append(_row("before overhead", plan.before_overhead, plan.total))
            words = COMPONENTS[name] + (
                f" ({setting.adapter_dtype})" if name in ("adapters", "gradients") else ""
            )
            lines.append(_row(words, size, plan.total))
    lines.append(_row("total", plan.total, plan.total) + f"   = {plan.total / GIB:.1f} GiB")
    for name, size in plan.host.items():
        if size:
            lines.append(_row(f"in host memory: {COMPONENTS[name]}", size, 0))
    return "\n".join(lines)


def _row(words: str, size: int, total: int) -> str:
    share = f"{size / total:8.1%}" if total else ""
    return f"  {words:{WIDTH - 2}}{size / GB:>9,.3f}{share}"


def _remedy(place: int, remedy: Remedy) -> str:
    lines = "\n".join(f"       {line}" for line in remedy.yaml.splitlines())
    margin = remedy.verdict
    left = f"{margin.spare_bytes / GIB:.1f} GiB left over"
    if margin.kind == "fits with paging":
        left = f"with {-margin.spare_bytes / GIB:.1f} GiB paged at the peak"
    return (
        f"  {place}. {remedy.words}: {remedy.plan.total / GIB:.1f} GiB, {left}\n"
        f"     costs: {remedy.cost}\n{lines}"
    )


def _no_remedy(advice: Advice) -> str:
    if advice.least is None:
        return "Nothing that this plan can change would make it fit; take a smaller base."
    least = advice.least
    return (
        f"Nothing that this plan can change would make it fit: with {least.words} it still takes "
        f"{least.plan.total / GIB:.1f} GiB; take a smaller base or more memory."
    )


def _card_line(result: CardResult) -> str:
    time = result.time
    assert time is not None
    return (
        f"{result.card.name:11}{result.card.memory_bytes / GIB:>6.1f}  {result.verdict.kind:17}"
        f"{time.tokens_per_second:>9,.0f}{time.share_of_peak:>6.0%}"
        f"{time.share_without_recomputing:>6.0%}{_or_dash(time.hours):>8}"
        f"{_or_dash(time.kilowatt_hours):>8}{_or_dash(time.price, 2):>9}"
    )


def _or_dash(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _gb(size: int) -> str:
    return f"{size / GB:,.1f} GB" if size >= GB / 10 else f"{size / 1e6:,.0f} MB"
