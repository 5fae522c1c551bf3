"""What a site owns: its settings, its pinned keys, its approvals, and what it agrees to."""
