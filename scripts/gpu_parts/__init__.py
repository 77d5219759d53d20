"""What ``scripts/gpu_report.py`` carries out, and how: parts, their processes, the report and its archive."""
