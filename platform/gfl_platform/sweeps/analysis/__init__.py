"""What a sweep shows: statistics, verdicts, figures and the report."""
