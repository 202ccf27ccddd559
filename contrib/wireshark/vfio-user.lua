-- What `limosa trace --pcap` wrote, for Wireshark and tshark (docs/trace.md: The capture file).
--
--   tshark -X lua_script:contrib/wireshark/vfio-user.lua -r FILE
--
-- Or copy it to the folder of personal Lua plugins. It takes LINKTYPE_USER0 for itself.

local limosa = Proto("limosa", "limosa trace")
local vfio = Proto("vfio_user", "vfio-user")

local kinds = {
    [0] = "message to the server", [1] = "message to the client",
    [2] = "malformed, to the server", [3] = "malformed, to the client",
    [4] = "ioctl", [5] = "read", [6] = "write", [7] = "close",
}

-- vfio-user.rst: Commands.
local commands = {
    [1] = "VERSION", [2] = "DMA_MAP", [3] = "DMA_UNMAP", [4] = "DEVICE_GET_INFO", [5] = "DEVICE_GET_REGION_INFO",
    [6] = "DEVICE_GET_REGION_IO_FDS", [7] = "DEVICE_GET_IRQ_INFO", [8] = "DEVICE_SET_IRQS", [9] = "REGION_READ",
    [10] = "REGION_WRITE", [11] = "DMA_READ", [12] = "DMA_WRITE", [13] = "DEVICE_RESET", [14] = "DIRTY_PAGES",
    [15] = "REGION_WRITE_MULTI", [16] = "DEVICE_FEATURE", [17] = "MIG_DATA_READ", [18] = "MIG_DATA_WRITE",
}

-- vfio.h: VFIO_DEVICE_FEATURE_*, and docs/vfio-user-extensions.md.
local features = {
    [0] = "PCI_VF_TOKEN", [1] = "MIGRATION", [2] = "MIG_DEVICE_STATE", [3] = "LOW_POWER_ENTRY",
    [4] = "LOW_POWER_ENTRY_WITH_WAKEUP", [5] = "LOW_POWER_EXIT", [6] = "DMA_LOGGING_START", [7] = "DMA_LOGGING_STOP",
    [8] = "DMA_LOGGING_REPORT", [9] = "MIG_DATA_SIZE", [10] = "BUS_MASTER", [11] = "DMA_BUF",
    [12] = "MIG_PRECOPY_INFO_V2", [0xfe00] = "PRECOPY_INFO", [0xfe01] = "DATA_FD", [0xfe02] = "RESET_COUNT",
    [0xfe03] = "STAY", [0xfe04] = "ECHO", [0xfe05] = "KICK", [0xfe06] = "NEXT",
}

-- vfio.h: enum vfio_device_mig_state.
local states = {
    [0] = "ERROR", [1] = "STOP", [2] = "RUNNING", [3] = "STOP_COPY", [4] = "RESUMING", [5] = "RUNNING_P2P",
    [6] = "PRE_COPY", [7] = "PRE_COPY_P2P",
}

local f = {
    version = ProtoField.uint8("limosa.version", "Version"),
    kind = ProtoField.uint8("limosa.kind", "Kind", base.DEC, kinds),
    fds = ProtoField.uint16("limosa.fds", "File descriptors"),
    pid = ProtoField.uint32("limosa.pid", "Process"),
    number = ProtoField.uint32("limosa.number", "Connection, or file descriptor"),
    name = ProtoField.string("limosa.name", "Device"),
    result = ProtoField.int64("limosa.result", "Result, or negative errno"),
    duration = ProtoField.uint64("limosa.duration_ns", "Duration in ns"),
    ioctl = ProtoField.uint32("limosa.ioctl", "ioctl", base.HEX),
    offset = ProtoField.uint64("limosa.offset", "Offset", base.HEX),
    bytes = ProtoField.bytes("limosa.bytes", "Bytes"),
}
limosa.fields = f

local m = {
    id = ProtoField.uint16("vfio_user.id", "Message ID"),
    command = ProtoField.uint16("vfio_user.command", "Command", base.DEC, commands),
    size = ProtoField.uint32("vfio_user.size", "Message size"),
    flags = ProtoField.uint32("vfio_user.flags", "Flags", base.HEX),
    kind = ProtoField.uint32("vfio_user.type", "Type", base.DEC, { [0] = "command", [1] = "reply" }, 0xf),
    no_reply = ProtoField.bool("vfio_user.no_reply", "No reply", 32, nil, 0x10),
    failed = ProtoField.bool("vfio_user.failed", "Error", 32, nil, 0x20),
    errno = ProtoField.uint32("vfio_user.error", "errno"),
    json = ProtoField.string("vfio_user.capabilities", "Capabilities"),
    region = ProtoField.uint32("vfio_user.region", "Region"),
    offset = ProtoField.uint64("vfio_user.offset", "Offset", base.HEX),
    address = ProtoField.uint64("vfio_user.address", "Address", base.HEX),
    count = ProtoField.uint64("vfio_user.count", "Count"),
    argsz = ProtoField.uint32("vfio_user.argsz", "argsz"),
    feature = ProtoField.uint32("vfio_user.feature", "Feature", base.DEC, features, 0xffff),
    get = ProtoField.bool("vfio_user.feature.get", "GET", 32, nil, 0x10000),
    set = ProtoField.bool("vfio_user.feature.set", "SET", 32, nil, 0x20000),
    probe = ProtoField.bool("vfio_user.feature.probe", "PROBE", 32, nil, 0x40000),
    state = ProtoField.uint32("vfio_user.state", "State", base.DEC, states),
    data_fd = ProtoField.int32("vfio_user.data_fd", "data_fd"),
    data_size = ProtoField.uint64("vfio_user.stop_copy_length", "stop_copy_length"),
    migration = ProtoField.uint64("vfio_user.migration_flags", "Migration flags", base.HEX),
    page_size = ProtoField.uint64("vfio_user.page_size", "Page size"),
    data = ProtoField.bytes("vfio_user.data", "Data"),
}
vfio.fields = m

local bad = ProtoExpert.new("limosa.malformed", "Malformed", expert.group.MALFORMED, expert.severity.ERROR)
limosa.experts = { bad }

-- struct vfio_device_feature and its payload; returns what the info column says.
local function feature(buffer, tree)
    if buffer:len() < 8 then return "DEVICE_FEATURE" end
    local flags = buffer(4, 4):le_uint()
    tree:add_le(m.argsz, buffer(0, 4))
    tree:add_le(m.feature, buffer(4, 4))
    tree:add_le(m.get, buffer(4, 4))
    tree:add_le(m.set, buffer(4, 4))
    tree:add_le(m.probe, buffer(4, 4))
    local index = flags % 0x10000
    local op = ""
    if math.floor(flags / 0x40000) % 2 == 1 then op = op .. " PROBE" end
    if math.floor(flags / 0x10000) % 2 == 1 then op = op .. " GET" end
    if math.floor(flags / 0x20000) % 2 == 1 then op = op .. " SET" end
    local info = "FEATURE" .. op .. " " .. (features[index] or tostring(index))
    local payload = buffer:len() - 8
    if index == 1 and payload >= 8 then
        tree:add_le(m.migration, buffer(8, 8))
    elseif index == 2 and payload >= 8 then
        tree:add_le(m.state, buffer(8, 4))
        tree:add_le(m.data_fd, buffer(12, 4))
        local state = buffer(8, 4):le_uint()
        info = info .. " " .. (states[state] or tostring(state))
    elseif index == 6 and payload >= 16 then
        tree:add_le(m.page_size, buffer(8, 8))
    elseif index == 8 and payload >= 24 then
        tree:add_le(m.address, buffer(8, 8))
        tree:add_le(m.count, buffer(16, 8))
        tree:add_le(m.page_size, buffer(24, 8))
    elseif index == 9 and payload >= 8 then
        tree:add_le(m.data_size, buffer(8, 8))
    elseif payload > 0 then
        tree:add(m.data, buffer(8))
    end
    return info
end

-- One message, as much of it as was kept.
function vfio.dissector(buffer, pinfo, tree)
    if buffer:len() < 16 then return 0 end
    local command = buffer(2, 2):le_uint()
    local flags = buffer(8, 4):le_uint()
    local errno = buffer(12, 4):le_uint()
    local is_reply = flags % 16 == 1
    local failed = math.floor(flags / 0x20) % 2 == 1
    local name = commands[command] or ("message " .. command)
    local sub = tree:add(vfio, buffer(), "vfio-user " .. name)
    sub:add_le(m.id, buffer(0, 2))
    sub:add_le(m.command, buffer(2, 2))
    sub:add_le(m.size, buffer(4, 4))
    sub:add_le(m.flags, buffer(8, 4))
    sub:add_le(m.kind, buffer(8, 4))
    sub:add_le(m.no_reply, buffer(8, 4))
    sub:add_le(m.failed, buffer(8, 4))
    sub:add_le(m.errno, buffer(12, 4))
    local info = name
    if buffer:len() > 16 then
        local body = buffer(16):tvb()
        local length = body:len()
        if command == 16 then
            info = feature(body, sub)
        elseif command == 1 and length > 4 then
            sub:add(m.json, body(4))
        elseif (command == 9 or command == 10) and length >= 16 then
            sub:add_le(m.offset, body(0, 8))
            sub:add_le(m.region, body(8, 4))
            sub:add_le(m.count, body(12, 4))
            if length > 16 then sub:add(m.data, body(16)) end
            info = info .. " region " .. body(8, 4):le_uint()
        elseif (command == 11 or command == 12) and length >= 12 then
            sub:add_le(m.address, body(0, 8))
            sub:add_le(m.count, body(8, 4))
        elseif command == 2 and length >= 32 then
            sub:add_le(m.address, body(16, 8))
            sub:add_le(m.count, body(24, 8))
        elseif (command == 17 or command == 18) and length >= 8 then
            sub:add_le(m.count, body(4, 4))
        else
            sub:add(m.data, body())
        end
    end
    if failed then info = info .. " refused, errno " .. errno end
    pinfo.cols.info = (is_reply and "reply " or "") .. info
    return buffer:len()
end

function limosa.dissector(buffer, pinfo, tree)
    if buffer:len() < 16 then return 0 end
    pinfo.cols.protocol = "vfio-user"
    local kind = buffer(1, 1):uint()
    local name_bytes = buffer(12, 2):le_uint()
    local sub = tree:add(limosa, buffer(), "limosa trace, " .. (kinds[kind] or "unknown kind"))
    sub:add(f.version, buffer(0, 1))
    if buffer(0, 1):uint() ~= 1 or buffer:len() < 16 + name_bytes then
        sub:add_proto_expert_info(bad, "not a packet of version 1")
        return buffer:len()
    end
    sub:add(f.kind, buffer(1, 1))
    sub:add_le(f.fds, buffer(2, 2))
    sub:add_le(f.pid, buffer(4, 4))
    sub:add_le(f.number, buffer(8, 4))
    local name = ""
    if name_bytes > 0 then
        sub:add(f.name, buffer(16, name_bytes))
        name = buffer(16, name_bytes):string()
    end
    local server, client = name, "pid " .. buffer(4, 4):le_uint()
    if kind == 1 or kind == 3 or kind == 5 then server, client = client, server end
    pinfo.cols.src = client
    pinfo.cols.dst = server
    local at = 16 + name_bytes
    if buffer:len() == at then return at end
    local rest = buffer(at):tvb()
    if kind == 0 or kind == 1 then
        vfio.dissector(rest, pinfo, tree)
    elseif kind == 2 or kind == 3 then
        sub:add(f.bytes, rest())
        sub:add_proto_expert_info(bad, "no vfio-user message")
        pinfo.cols.info = "malformed"
    elseif rest:len() >= 16 then
        sub:add_le(f.result, rest(0, 8))
        sub:add_le(f.duration, rest(8, 8))
        local info = kinds[kind]
        if kind == 4 and rest:len() >= 24 then
            local before = rest(20, 4):le_uint()
            local number = rest(16, 4):le_uint()
            sub:add_le(f.ioctl, rest(16, 4))
            info = string.format("ioctl 0x%x", number)
            if number == 0x3b75 and before >= 8 and rest:len() >= 24 + before then
                info = feature(rest(24, before):tvb(), sub)
                if rest:len() >= 24 + 2 * before then
                    feature(rest(24 + before, before):tvb(), sub:add(limosa, rest(24 + before, before), "After the call"))
                end
            elseif rest:len() > 24 then
                sub:add(f.bytes, rest(24))
            end
        elseif rest:len() >= 24 then
            sub:add_le(f.offset, rest(16, 8))
            if rest:len() > 24 then sub:add(f.bytes, rest(24)) end
        end
        local result = rest(0, 8):le_int64():tonumber()
        pinfo.cols.info = info .. " = " .. result
    end
    return buffer:len()
end

DissectorTable.get("wtap_encap"):add(wtap.USER0, limosa)
