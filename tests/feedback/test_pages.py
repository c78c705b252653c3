"""The pages as a browser without scripts has them."""

from __future__ import annotations

import json
import logging
import re
import time
from html import unescape

import pytest
from conftest_names import SECRET

from keel.feedback.auth import SESSION
from keel.votes.kinds import Answer, NewItem, Project, Reply
