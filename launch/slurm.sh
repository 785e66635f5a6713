#!/bin/bash
#SBATCH --job-name=ejmp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#
#   sbatch launch/slurm.sh launch/distill.py --blocks 4 --run RUN
#
# One task is one process; srun says who is who, no other launcher is needed. Five minutes before the time is up, or
# when the job is preempted, every process finishes its step, saves and exits with status 0, and the job goes back into
# the queue. From the second start on, the same command is run with --resume.
set -euo pipefail
stopped=0
resume=()
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then resume=(--resume); fi
srun --kill-on-bad-exit=1 python "$@" "${resume[@]}" &
steps=$!
trap 'stopped=1; kill -USR1 "$steps"' USR1 TERM # srun passes it on to all tasks
status=0
wait "$steps" || status=$?
if [ "$stopped" = 1 ]; then # the trap ended that wait, not srun
  status=0
  wait "$steps" || status=$?
  if [ "$status" = 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit "$status"
