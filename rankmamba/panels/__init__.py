"""The panels of the notebooks (ipywidgets): views of functions of the package, built only in interactive notebooks."""

from transformers.utils import logging

from .controls import close
from .cost import ProfilePanel
from .ranking import RankingPanel
from .states import StatesPanel
from .training import TrainingPanel

__all__ = ["ProfilePanel", "RankingPanel", "StatesPanel", "TrainingPanel", "close"]

# What a thread prints appears under whatever cell ran last; the panels show their own progress.
logging.disable_progress_bar()
