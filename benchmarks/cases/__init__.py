"""The cases, one module for each operator; `CASES` of each is what `benchmarks.registry` puts together."""
