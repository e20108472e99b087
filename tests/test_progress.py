from graftkit.progress import Progress, StepProgress, silent


def test_the_default_takes_what_every_kind_of_progress_is_called_with(capsys):
    of_steps: Progress = silent
    of_one_step: StepProgress = silent
    of_steps("packing", 1, 2)
    of_one_step(1, 2)
    assert capsys.readouterr() == ("", "")
