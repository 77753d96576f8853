"""What several test files share: no test is in here, and no test file imports another."""
