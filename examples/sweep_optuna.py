"""Search for settings of EASGD with Optuna: each trial is a run of mpitrain train on several ranks.

    pip install optuna
    python examples/sweep_optuna.py --trials 10 --ranks 4

This process is no rank: it starts one ``mpirun`` after the other, and reads the result of each from its run folder. The
study is a file, so a search that was interrupted continues.
"""

import argparse
import json
import subprocess
from pathlib import Path

import optuna

ROOT = Path(__file__).resolve().parent.parent

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--trials", type=int, default=10)
parser.add_argument("--ranks", type=int, default=4)
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--out", type=Path, default=Path("runs/optuna"), help="folder of the study and of its runs")
options = parser.parse_args()


def test_loss(trial: optuna.Trial) -> float:
    """Train with the settings of a trial; return the test loss."""
    settings = {
        "period": trial.suggest_int("period", 1, 32, log=True),
        "moving_rate": trial.suggest_float("moving_rate", 0.01, 0.5, log=True),
    }
    lr = trial.suggest_float("lr", 0.01, 0.3, log=True)
    run = options.out / f"trial-{trial.number}"
    command = [ROOT / "jobs" / "local.sh", options.ranks, "mpitrain", "train", "--algorithm", "easgd", "--lr", lr]
    command += [f"--set={name}={value}" for name, value in settings.items()]
    command += ["--data", "digits", "--model", "mlp", "--epochs", options.epochs, "--out", run]
    ended = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True)
    if ended.returncode == 5:  # the loss became infinite
        raise optuna.TrialPruned
    if ended.returncode != 0:
        raise RuntimeError(ended.stderr)
    return json.loads((run / "result.json").read_text())["test_loss"]


options.out.mkdir(parents=True, exist_ok=True)
study = optuna.create_study(
    study_name="easgd", storage=f"sqlite:///{options.out / 'study.db'}", load_if_exists=True, direction="minimize"
)
study.optimize(test_loss, n_trials=options.trials)
print(f"best of {len(study.trials)} trials: test loss {study.best_value:.4f} with {study.best_params}")
