#!/bin/bash
# A training on several machines of a Slurm cluster: sbatch slurm.sh
# It is started again after the failure of a machine, after a preemption, and shortly before its time is over; each time
# it resumes. Change the lines with mydata, the sizes, and the address of the MLflow server.
#SBATCH --job-name=retinaflow
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=retinaflow-%j.log
#SBATCH --signal=B:USR1@300

set -euo pipefail

# Folders that all machines see: the locks and the checkpoints are in outputs.
cd "$SLURM_SUBMIT_DIR"
export MLFLOW_TRACKING_URI=http://mlflow.example:5000

# Slurm starts no job again whose time is over. So this script asks for it 300 seconds before; Slurm then sends SIGTERM to
# the training, which saves its checkpoint, and waits KillWait (30 seconds) before it kills.
trap 'echo "the time is over soon: requeued"; scontrol requeue "$SLURM_JOB_ID"' USR1

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# In the background, as the shell runs a trap only while it waits.
srun --kill-on-bad-exit=1 torchrun \
  --nnodes="$SLURM_NNODES" \
  --nproc-per-node=8 \
  --max-restarts=3 \
  --rdzv-backend=c10d \
  --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  --rdzv-endpoint="$first:29500" \
  -m retinaflow train --data mydata --batch_size 128 --output outputs --resume auto &
training=$!

# A trap ends the first wait.
while kill -0 "$training" 2>/dev/null; do
  wait "$training" && code=0 || code=$?
done
exit "${code:-0}"
