"""What is measured: prompt suites, and (with later issues) peers, reproductions and reports."""
