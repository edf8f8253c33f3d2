"""Jobs of many rows: planned, resumed, committed once each. It knows neither speech nor who computes a row."""
