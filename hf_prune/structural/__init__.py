"""Structure: groups that can vanish, what they are worth, and how they vanish for good."""

from .groups import KINDS, Axis, Groups, Member, groups_of
from .shrink import check, config_with, remove


__all__ = ["KINDS", "Axis", "Groups", "Member", "check", "config_with", "groups_of", "remove"]
