"""Compare pruning policies at equal cost through one recipe, next to the full and the short run.

    python recipes/compare.py --output_dir runs/study --rules random epsilon-greedy ucb \\
        --costs 0.3 --seeds 0 1 2 --learning_rates 0.2 0.4 0.8 \\
        -- recipes/cifar.py --model resnet8_cifar --num_train_epochs 20

Give the recipe and the options of all runs after the two dashes. The cost of a run is its passes,
divided by those of the full run. The study has a full run for each seed, and for each cost:

    short run  All data for cost * epochs. The learning rate schedule is compressed to them. This
               is the baseline to beat.
    a rule     All epochs, with the keep_ratio at which the whole run has the cost. Scoring passes,
               full-data epochs and charged scores count. A rule that cannot meet the cost is not
               ranked: the table shows it in brackets, with the cost that it had.
    scores     Static pruning by el2n, grand, forgetting and so on, hardest samples first, through a
               recipe with --score. The scores reference go to the policy reference-loss instead.
               It is run twice: "charged" subtracts the cost of the scores
               from the training budget, "given" treats the scores as free.

A rule is the name of a policy. Fields of the policy and options of the recipe may follow; the
options are for the runs of this rule only. Options may also follow the name of a score:

    'ucb:{"scoring": "dropped"}'
    'ucb --num_train_epochs 12'     fewer epochs at the same cost: each keeps more of the data
    'el2n --score_runs 2'

--learning_rates tunes first. The full run and, for each cost, the short run and each rule are run
at each learning rate. --tune first tunes only the first rule, for all rules. The tuning runs hold
out --validation_share of the training data, always the same part, and are evaluated on it. If the
best rate of a method is the lowest or highest, the next one beyond is tried, too. All other runs
use the best rates, and see the test set once, at their end. The runs that make scores use the rate
of the full run. A method that was not tuned uses the rate of the same policy without fields, or of
the first rule. --rates_of takes the rates and batch sizes that another study chose, for example
those of short runs for a study of long runs.

Fewer samples a step are more steps at the same cost, so the batch size is part of the budget.
--batch_sizes tunes it, too: each method, the short run as well, takes the batch size and the rate
that are best for it. The full run keeps the recipe's batch size, and only its rate is tuned: it is
not compared at equal cost. If the study was tuned without --batch_sizes before, the recipe's batch
size is one of those to choose from.

For choices other than learning rates give --validation_share to the recipe. Then all runs of the
study are evaluated on the part that is held out.

Each run is a program that leaves its report and its log in a folder of the study. Start the
command again, with more seeds, rules, costs or rates if you like: the study continues with the
runs that are not finished. The finished runs are summarised in:

    table_0.3.md       for each cost: mean and standard deviation of the last evaluation over the
                       seeds; differences to the short run and to dynamic random pruning, paired
                       by seed, with a 95 % interval
    picture_0.3.png    the values of each seed and their means
    selection_0.3.png  how often the nine best rules kept the samples, and how often by chance
    picture.png        the value that each method reached at each cost
    targets.md, .png   the cost at which a method reaches a value, on the line through its means;
                       made if a method has several costs, or with --targets
    tuning.md          the value at each learning rate and batch size, on the data held out
    summary.json       all of it

--output_dir alone renews these files.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recipes.studies.command import main

if __name__ == "__main__":
    main(__doc__)
