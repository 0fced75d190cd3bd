-- Sends the bodies of a file, one after the other and each only once while they last, and prints what wrk measured as one line of JSON.
-- wrk ... -s serving.lua URL -- BODIES KEY PAUSE, with a line "path<TAB>body" for each request, and PAUSE in milliseconds.

local number = 0

function setup(thread)
  thread:set("number", number)
  number = number + 1
end

function init(args)
  bodies, next_one, wrong = {}, 0, 0
  local place = 0
  for line in io.lines(args[1]) do
    if place % tonumber(args[4]) == number then
      bodies[#bodies + 1] = line
    end
    place = place + 1
  end
  head = {["Content-Type"] = "application/json", ["Authorization"] = "Bearer " .. args[2]}
  pause = tonumber(args[3])
end

function delay()
  return pause
end

function request()
  local line = bodies[next_one % #bodies + 1]
  next_one = next_one + 1
  local path, body = line:match("^(%S+)\t(.*)$")
  return wrk.format("POST", path, head, body)
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format('{"requests": %d, "seconds": %.3f, "errors": %d, "p50": %.3f, "p95": %.3f, "p99": %.3f, "most": %.3f}\n',
    summary.requests, summary.duration / 1e6, errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    latency:percentile(50) / 1000, latency:percentile(95) / 1000, latency:percentile(99) / 1000, latency.max / 1000))
end
