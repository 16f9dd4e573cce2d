"""What a researcher adds to the driver: audit, analysis, comparison, report."""
