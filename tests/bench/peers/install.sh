#!/usr/bin/env bash
# Makes a virtual environment for each peer in the folder given: tests/bench/peers/install.sh DIR [PYTHON]
# About 3 GB. No weights are downloaded: every peer gets the same random ones.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
folder="$1"
python="${2:-python3}"
mkdir -p "$folder"
for peer in llm-guard openai-guardrails guardrails-ai nemoguardrails; do
  [ -x "$folder/$peer/bin/python" ] || "$python" -m venv "$folder/$peer"
  "$folder/$peer/bin/pip" install --quiet --requirement "$here/$peer.txt"
done
