"""What the suite `hasten.bench.parallelbench` is made of: tasks, metrics, theory, an oracle with exact conditionals."""
