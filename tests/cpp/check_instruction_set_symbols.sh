#!/usr/bin/env bash
# Objects compiled for one instruction set (*_avx2, *_amx and so on) must define no weak symbol. The linker
# keeps one copy of a weak symbol, and may keep theirs: code that every machine runs would then stop
# with an illegal instruction on a machine without that set.
set -euo pipefail
library=$1
symbols=$(nm -C --defined-only "$library")
grep -q '_avx2\.cpp\.o:' <<<"$symbols" || { echo "no *_avx2 object in $library"; exit 1; }
weak=$(awk '/\.o:$/ { object = $0; next }
            object ~ /_(avx2|avx512|avx512vnni|amx|dotprod)\.cpp\.o:$/ && $2 ~ /^[WwVvu]$/ { print object, $0 }' <<<"$symbols")
if [[ -n $weak ]]; then
  printf 'weak symbols in objects of one instruction set:\n%s\n' "$weak"
  exit 1
fi
echo "no weak symbol in objects of one instruction set"
