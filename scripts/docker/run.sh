#!/usr/bin/env bash
# `fmcib-ssl` in the container, with the current folder as its working directory, so that relative paths mean the same:
#
#   scripts/docker/run.sh demo
#   scripts/docker/run.sh train +experiment=phantom_ntxent_mined
#   scripts/docker/run.sh --gpus all -v /archive/ct:/data:ro -- train +experiment=ct_ntxent_mined hardware=gpu data.annotations=/data/lesions.csv
#
# What stands before `--` goes to `docker run`, and wins over what is set below; the rest goes to fmcib-ssl.
# FMCIB_SSL_IMAGE names another image than fmcib_ssl, such as fmcib_ssl:cpu. docs/containers.md explains the settings.
set -euo pipefail

arguments=(
  run --rm
  --init                                    # signals reach the training, which a first process would not get
  --stop-timeout 120                        # seconds that `docker stop` leaves for saving a checkpoint
  --read-only --tmpfs /tmp:exec             # nothing but the mounts outlives the run; Triton executes what it compiles in /tmp
  --cap-drop ALL --security-opt no-new-privileges
  --shm-size 8g                             # workers hand over batches in shared memory; an upper limit, taken as needed
  --user "$(id -u):$(id -g)"
  --volume "$PWD:/workspace"
)
for group in $(id -G); do                   # data is often readable through a group that is not one's first
  arguments+=(--group-add "$group")
done
if [ -t 0 ] && [ -t 1 ]; then
  arguments+=(--interactive --tty)
fi

for argument in "$@"; do
  if [ "$argument" = -- ]; then             # with no `--`, everything is for fmcib-ssl
    while [ "$1" != -- ]; do
      arguments+=("$1")
      shift
    done
    shift
    break
  fi
done
exec docker "${arguments[@]}" "${FMCIB_SSL_IMAGE:-fmcib_ssl}" "$@"
