"""Structure: groups that can vanish, what they are worth, and how they vanish for good."""

from .groups import KINDS, Axis, Groups, Member, groups_of
from .shrink import built_with, check, remove


__all__ = ["KINDS", "Axis", "Groups", "Member", "built_with", "check", "groups_of", "remove"]
