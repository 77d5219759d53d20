"""The report of a campaign, report.md and report.html, computed from the records of its runs."""

from kfac_sua.campaign.report.document import ReportInput, write_report

__all__ = ["ReportInput", "write_report"]
