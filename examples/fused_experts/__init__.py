"""Two experts that speak as one, by weights fitted on what they say."""
