"""The comparison tool behind `python recipes/compare.py`.

    plan.py         rules and runs as values, and the keep_ratio at which a run meets a cost
    summarise.py    rows, differences, targets and tables of the runs that are finished
    draw.py         the pictures of a study
    run.py          carries out what is left of a study
    command.py      the command line
    potential.py    what the effective share says of the finished studies; a program of its own

Beside it stands the study of prompts, whose runs are short and share a process:

    rl_results.py   rows, table and picture of its runs
    rl.py           carries them out; both are programs

Each file imports only files above it, but for draw.py, which summarise.py calls.
"""
