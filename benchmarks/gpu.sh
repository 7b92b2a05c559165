#!/usr/bin/env bash
# Everything that only a GPU can show, in ten minutes and without a network: OUT/*.json and one table, OUT/report.md.
#
#   bash benchmarks/gpu.sh [OUT] [--quick] [--device cpu]
#
# PYTHON names the interpreter. Each part is a process with a time limit; one that fails is reported, and the next runs.
# The most telling part is the first, and the table is written anew after each: a session that is cut off keeps it.
# QUICK=1, or --quick, takes small models: with --device cpu it shows on any machine that all parts run.
set -u
cd "$(dirname "$0")/.." || exit 2
if [ -n "${QUICK:-}" ]; then set -- "$@" --quick; fi
exec "${PYTHON:-python}" benchmarks/gpu.py "$@"
