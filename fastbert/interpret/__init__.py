"""Why a model says what it says: scores of a text's tokens, attention maps, and how faithful both are.

explainer = Explainer("runs/reviews")
attribution = explainer("A splendid film.", method="integrated")
write_html(attribution, "why.html")
"""

from fastbert.interpret.attributions import METHODS, Attribution, explain
from fastbert.interpret.explainer import Explainer
from fastbert.interpret.faithful import Judged, judge, randomised, sanity
from fastbert.interpret.images import PatchScores, explain_image, write_patches_png
from fastbert.interpret.pages import write_html, write_png
from fastbert.interpret.question import Question, Target
from fastbert.interpret.rollout import attention_maps
from fastbert.interpret.targets import (
    answer_target,
    class_target,
    similarity_target,
    tag_target,
    word_target,
)

__all__ = [
    "METHODS",
    "Attribution",
    "Explainer",
    "Judged",
    "PatchScores",
    "Question",
    "Target",
    "answer_target",
    "attention_maps",
    "class_target",
    "explain",
    "explain_image",
    "judge",
    "randomised",
    "sanity",
    "similarity_target",
    "tag_target",
    "word_target",
    "write_html",
    "write_patches_png",
    "write_png",
]
