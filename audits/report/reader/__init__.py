"""What a report says first, to readers who sign it and need no formula."""
