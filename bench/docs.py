"""Writes docs/performance.md from a result of bench/run."""


def write(result_path, path):
    raise NotImplementedError
