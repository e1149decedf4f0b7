#!/usr/bin/env bash
# Run mpitrain train under Flux. Arguments of the script are passed to the command:
#
#     RUN=runs/easgd flux batch -N 2 -n 8 jobs/train.flux --algorithm easgd --data digits --model mlp
#
# Flux sends USR1 two minutes before the time limit (--signal). The job then submits itself again to the instance that
# it came from, and continues from the last checkpoint; jobs/lib.sh has the rules. Submit it in the project's folder, or
# set JOBS to the path of jobs/.
#
# Environment: RUN, STAGE, RESTARTS, ... see jobs/lib.sh and jobs/env.sh
# flux: --job-name=mpitrain
# flux: --time-limit=60m
# flux: --signal=USR1@2m
# flux: --output={{name}}-{{id}}.out
set -euo pipefail

jobs=${JOBS:-jobs}
# shellcheck source=jobs/lib.sh
source "$jobs/lib.sh"

run=${RUN:-runs/mpitrain-$job_id}
export RUN=$run # the job that this one submits continues it
RESUBMIT=(-N "$(flux resource list -n -o '{nnodes}')" -n "$n_ranks" "$jobs/train.flux" "$@")
require_world
train_to_the_end "$run" "$@"
